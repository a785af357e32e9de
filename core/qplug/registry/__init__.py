"""Finds plugins, collects what they offer, names them in errors, and writes new ones."""
