"""Calibration tokens pass through the blocks of a model, and statistics are kept of them."""
