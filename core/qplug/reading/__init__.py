"""Reads folders back: opens, loads, verifies, compares, measures and serves them."""
