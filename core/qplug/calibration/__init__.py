"""Calibration: tokens pass through the blocks of a model, and statistics of them are gathered."""
