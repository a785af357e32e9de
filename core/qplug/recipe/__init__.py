"""Recipes and jobs as data, the files that contain them, and checks of them."""
