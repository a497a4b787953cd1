"""One folder per operation: reference.py defines it in plain jnp, the others are faster, __init__.py chooses."""
