"""Tensors in files: a model's folder is found and opened, and its tensors are read."""
