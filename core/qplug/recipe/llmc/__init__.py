"""Reads LLMC's YAML files as jobs."""
