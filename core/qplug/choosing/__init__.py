"""Chooses the schemes of a model for a budget: candidates, sensitivities, and an exact solver."""
