"""Finds plugins, collects what they offer, names them in errors, and writes new ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qplug.api.old_paths import moved_names

if not TYPE_CHECKING:  # a type checker would take any name for one of this module
    __getattr__ = moved_names(__name__, {"Registry": ("qplug", "Registry")})
