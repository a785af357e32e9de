"""Folders read back: opened, loaded, verified, compared, measured and served."""
