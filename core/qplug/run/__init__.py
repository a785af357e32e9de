"""The run: prepare, quantize, write."""
