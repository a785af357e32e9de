"""Arithmetic that algorithms share: scales, rounding, clips, rotations and learning."""
