"""Tensors in files: a model's folder is found and opened, and its tensors are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qplug.api.old_paths import moved_names

if not TYPE_CHECKING:  # a type checker would take any name for one of this module
    __getattr__ = moved_names(__name__, {"Checkpoint": ("qplug", "Checkpoint")})
