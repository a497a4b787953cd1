"""Training mixtures made of prepared documents: a directory that says which, and programs that read it by name."""
