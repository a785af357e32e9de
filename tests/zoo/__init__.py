"""Tiny random checkpoints of the architectures that engines serve, and what qplug makes of them."""
