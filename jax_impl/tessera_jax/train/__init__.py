"""Training: the optimizer, one step, and what shards and drives it."""
