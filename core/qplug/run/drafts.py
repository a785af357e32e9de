"""Does with the draft layers of a model (MTP) what a recipe asks: keep, quantize or drop them."""

from __future__ import annotations

from collections.abc import Mapping

from qplug.api import Checkpoint, ModelView
from qplug.api.scheme import Scheme
from qplug.checkpoint.draft_names import announced
from qplug.checkpoint.unindexed import left_behind
from qplug.errors import QplugError
from qplug.machine.read_ahead import read_ahead
from qplug.machine.session import Session
from qplug.model.architectures import by_linear, find_view, is_known_without_code
from qplug.model.draft_layers import draft_names, without_drafts
from qplug.model.skeleton import Skeleton
from qplug.model.view import with_embedding
from qplug.recipe.recipe import Recipe


def open_model(
    recipe: Recipe, source: Checkpoint, session: Session, skeleton: Skeleton
) -> tuple[Checkpoint, ModelView]:
    """Returns ``source`` and its view, without draft layers if ``recipe`` drops them.

    The checkpoint has a tensor for each linear of each expert. The embedding is one of the linears
    if an override has its very name. ``skeleton`` is that of ``source``.
    Raises QplugError if there are no draft layers to quantize, or if ``find_view`` does.
    """
    if not is_known_without_code(source, session.registry):
        read_ahead("models")
    source = by_linear(source, session.registry, skeleton)
    view = find_view(source, session.registry, skeleton)
    if recipe.mtp == "quantize" and not view.drafts:
        raise QplugError(f"--mtp quantize: {source.folder} has no draft layers with linears")
    if recipe.mtp == "quantize":
        _refuse_stacked(source, view)
    if recipe.mtp == "drop":
        source = without_drafts(source, view.blocks)
        view = find_view(source, session.registry, skeleton)
    if any(pattern == view.embedding for pattern, _ in recipe.overrides):
        view = with_embedding(view, source)
    return source, view


def refuse_static(schemes: Mapping[str, Scheme], view: ModelView) -> None:
    """Raises QplugError if a draft layer needs ranges of inputs: calibration does not run it."""
    for name, scheme in schemes.items():
        if name in view.drafts and scheme.static_inputs:
            raise QplugError(
                f"--mtp quantize: {name}: {scheme.name} stores ranges of inputs, which are "
                "not measured in draft layers; take a scheme with dynamic inputs, or --mtp keep"
            )


def notes_on(source: Checkpoint, view: ModelView, *, is_rewritten: bool) -> tuple[str, ...]:
    """Returns sentences about draft layers and about files of weights that a run leaves behind.

    ``is_rewritten``: whether an algorithm rewrites the model, but not its draft layers.
    """
    notes = [*left_behind(source)]
    drafts = draft_names(source.tensors, view.blocks)
    if announced(source.config) and not drafts:
        notes.append(
            "config.json announces draft layers (MTP) that the model lacks; --mtp drop takes them "
            "out of config.json"
        )
    if drafts and is_rewritten:
        notes.append(
            f"draft layers such as {drafts[0]} are not rewritten with the model: they will draft "
            "other tokens; --mtp drop leaves them out"
        )
    return tuple(notes)


def _refuse_stacked(source: Checkpoint, view: ModelView) -> None:
    """Raises QplugError if a draft layer has experts that are stacked in one tensor."""
    for name in draft_names(source.tensors, view.blocks):
        if ".experts." in name and len(source.tensors[name].spec.shape) > 2:
            raise QplugError(
                f"--mtp quantize: {name}: its experts are stacked in one tensor; pass --mtp keep"
            )
