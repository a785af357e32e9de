"""Writes HTML pages: a report on one quantized folder, and a comparison of several folders."""
