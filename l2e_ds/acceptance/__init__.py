"""Accepting a machine: whether it, its driver and its packages compute the right numbers, and how fast."""
