"""A package with a module of the same last name as one of `gin_samples`."""
