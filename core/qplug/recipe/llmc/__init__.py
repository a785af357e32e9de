"""LLMC's YAML files, read as jobs."""
