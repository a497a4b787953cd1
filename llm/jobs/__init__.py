"""What a gin file can run: one file a job, thin; each wires the packages below together."""
