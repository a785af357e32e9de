"""Plugins: found, asked for components, and named in errors; new ones are written."""
