"""Checks that a folder has the draft layers (MTP) that its config.json announces."""

from __future__ import annotations

from qplug.api import Checkpoint, Problem
from qplug.checkpoint.config_file import CONFIG
from qplug.checkpoint.draft_names import announced
from qplug.model.draft_layers import draft_names
from qplug.reading.folder import Folder


def drafts_missing(opened: Folder, source: Checkpoint | None) -> list[Problem]:
    """Returns a problem if ``opened`` announces draft layers that it lacks.

    Engines load such a folder, and fail or draft nothing if they are asked to use the layers. The
    float model ``source`` may lack the layers too: then the folder is as the model. A folder that
    qplug wrote from a model that is not at hand is as the model was.
    """
    blocks = opened.view.blocks
    if not announced(opened.checkpoint.config) or draft_names(opened.checkpoint.tensors, blocks):
        return []
    if source is None and opened.manifest is not None:
        return []
    if source is not None and not draft_names(source.tensors, blocks):
        return []
    what = "announces draft layers (MTP), but the folder has none"
    return [Problem("mtp", CONFIG, f"{what}: engines that draft with them fail")]


def dropped_drafts(opened: Folder, source: Checkpoint) -> frozenset[str]:
    """Returns the tensors of ``source`` that the recipe of the folder leaves out, by name."""
    recipe = opened.manifest.recipe if opened.manifest else {}
    if recipe.get("mtp") != "drop":
        return frozenset()
    return frozenset(draft_names(source.tensors, opened.view.blocks))
