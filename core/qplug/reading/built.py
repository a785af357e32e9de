"""Compares a folder with the modules that its engine builds: float ones, and ones with codes."""

from __future__ import annotations

from qplug.api import Problem
from qplug.model.float_share import LIMIT, FloatShare, float_share
from qplug.reading.folder import Folder
from qplug.recipe.assign import matches


def built_otherwise(opened: Folder) -> list[Problem]:
    """Returns a problem for each module that the engine builds otherwise than the folder has it.

    Too many float weights that nobody named are a problem too.
    """
    exporter = opened.exporter
    if exporter is None or exporter.format.stores_float:
        return []
    problems = []
    if exporter.engine is not None:
        for name, why in exporter.built_float(opened.view).items():
            if name in opened.schemes:
                who = " and ".join(why.engines) or "engines"
                sentence = f"is quantized, but {who} build it without quantization: {why.reason}"
                problems.append(Problem("built", name, sentence))
    for name in _experts_with_codes(opened):
        sentence = "its experts are float, but config.json makes engines build them with codes"
        problems.append(Problem("experts", name, sentence))
    share = share_of(opened)
    if share.silent > LIMIT and not problems:
        what = f"{share.silent:.0%} of the weights in decoder blocks are float, and nothing names"
        problems.append(Problem("float", ", ".join(share.unnamed), f"{what} them"))
    return problems


def share_of(opened: Folder) -> FloatShare:
    """Returns the share of the weights in decoder blocks that are float in the folder.

    A weight is named if the recipe ignores it, if ``config.json`` says that the linear or the
    experts stay float, or if the engine builds it so.
    """
    exporter, view = opened.exporter, opened.view
    ignored = opened.manifest.recipe.get("ignore", ()) if opened.manifest else ()
    floats = exporter.built_float(view) if exporter is not None else view.built_float
    coded = _experts_with_codes(opened)
    stacked = tuple(f"{name.rpartition('.')[0]}." for name in view.stacked_experts)
    config = opened.checkpoint.config.get("quantization_config")

    def is_named(name: str) -> bool:
        if name in floats or any(matches(pattern, name) for pattern in ignored):
            return True
        if config is None:
            return False
        if name in view.linears:
            return name in view.quantizable
        return name.startswith(stacked) and len(view.other_weights[name]) == 3 and not coded

    return float_share(view, opened.schemes, is_named)


def _experts_with_codes(opened: Folder) -> list[str]:
    """Returns the modules whose experts are float in the folder, but not for its engines."""
    config = opened.checkpoint.config.get("quantization_config")
    if opened.exporter is None or config is None:
        return []
    format_ = opened.exporter.format
    return [n for n in opened.view.stacked_experts if format_.quantizes_experts(config, n)]
