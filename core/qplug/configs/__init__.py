"""Runs written down in files: qplug's own recipes, and LLMC's YAML as it is."""
