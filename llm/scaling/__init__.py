"""What a model costs in compute and memory, on which hardware."""
