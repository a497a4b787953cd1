"""Flax modules and nothing else: how tokens become logits. Values, sharding and learning rates are read from specs."""
