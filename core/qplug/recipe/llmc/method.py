"""LLMC's ``quant.method`` and ``quant.special`` as a pipeline of algorithms with options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qplug.api.params import Option, by_all_names, convert, options
from qplug.errors import QplugError
from qplug.recipe.yaml_tree import Node, Section
from qplug.registry.registry import Registry

#: LLMC's methods, by the names of qplug's algorithms.
METHODS = {
    "RTN": "rtn",
    "Awq": "awq",
    "GPTQ": "gptq",
    "SmoothQuant": "smoothquant",
    "OsPlus": "osplus",
    "OmniQuant": "omniquant",
    "Quarot": "quarot",
    "SpinQuant": "spinquant",
    "HQQ": "hqq",
    "TesseraQ": "signround",
    "GPTBRECQ": "signround",
}

#: Memory, files between steps, and what qplug always does: of these any value will do.
_SILENT = (
    *("awq_bs", "save_mem", "chunk_num", "reduce_memory", "clip_path", "scale_path", "fp32_had"),
    *("clip_version", "do_gqa_trans", "search_clip_init", "quant_type", "n_outs"),
)

#: Keys that no option answers to: the values that change nothing, and what is so for the others.
_DIFFERENT: dict[str, tuple[tuple[Any, ...], str]] = {
    "static_groups": ((True,), "groups are always of neighbouring columns, which engines need"),
    "axis": ((1,), "groups are always of neighbouring columns, which engines need"),
    "weight_clip": ((False,), "this algorithm searches no clips; put awq before it"),
    "online_rotate": ((False,), "inputs are rotated where the folder of step 1 says so"),
    "save_clip": ((False,), "clips are not kept in files: say awq+omniquant in one recipe"),
    "save_scale": ((False,), "scales are not kept in files: say awq+omniquant in one recipe"),
    "deactive_amp": ((True,), "learning is in the precision that the algorithm has"),
    "use_shift": ((False,), "this algorithm moves no offsets"),
}

#: Where a method takes up what AWQ found in a run before: qplug runs AWQ first.
_AFTER_AWQ = ("load_clip", "search_scale_init", "load_transform")


@dataclass
class Pipeline:
    """Algorithms in order, their options, and where each was said."""

    algorithms: list[str]
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)


def read_method(quant: Section, registry: Registry) -> Pipeline:
    """The pipeline of a ``quant`` section. Raises QplugError if qplug has no such algorithm."""
    node = quant.need("method")
    name = _method(node, registry)
    places = dict.fromkeys(("algorithms", f"algorithms.{name}"), str(node.place))
    pipeline = Pipeline([name], places=places)
    try:
        kind = registry.algorithms[name]
    except QplugError as error:
        raise node.place.error(str(error)) from error
    special, weight = quant.section("special", "speical"), quant.section("weight")
    known = by_all_names(options(kind.Params))
    if special is not None:
        symmetric = weight is not None and weight.switch("symmetric")
        _read_special(special, name, known, symmetric, pipeline)
    mse = weight.get("calib_algo") if weight is not None else None
    if mse is not None and mse.value == "mse":
        _search_clips(mse, name, known, pipeline)
    return pipeline


def _method(node: Node, registry: Registry) -> str:
    told = node.word()
    for method, name in METHODS.items():
        if method.lower() == told.lower():
            return name
    there = set(registry.algorithms)
    allowed = [method for method, name in METHODS.items() if name in there]
    raise node.place.error(f"{told!r} is not there", allowed)


def _read_special(
    special: Section, name: str, known: dict[str, Option], symmetric: bool, pipeline: Pipeline
) -> None:
    found = pipeline.options.setdefault(name, {})
    for key in special:
        node, option = special.get(key), known.get(key)
        if node is None or _is_of_pipeline(special, key, node, pipeline):
            continue
        if option is None:
            _tell_difference(special, key, node, name, symmetric)
            continue
        if option.name in found:
            raise node.place.error(f"says {option.name!r} of {name} once more")
        found[option.name] = convert(option, node.plain(), f"{node.place}: {node.plain()}")


def _is_of_pipeline(special: Section, key: str, node: Node, pipeline: Pipeline) -> bool:
    """Whether ``key`` is about what runs at all."""
    if key == "owq" and node.switch():
        raise node.place.error("columns that stay float are not there", ["False"])
    if key in _AFTER_AWQ and node.switch() and "awq" not in pipeline.algorithms:
        pipeline.algorithms.insert(0, "awq")
        special.warn(key, "no file is read: awq runs first, and hands on what it finds")
    return key == "owq" or key in _AFTER_AWQ


def _tell_difference(special: Section, key: str, node: Node, name: str, symmetric: bool) -> None:
    """Warn of a key that no option answers to, if its value would have changed something."""
    if key == "clip_sym":
        if node.switch() != symmetric:
            special.warn(key, "no effect: a clip is symmetric where the weights are")
    elif key in _DIFFERENT:
        harmless, reason = _DIFFERENT[key]
        if node.plain() not in harmless:
            special.warn(key, f"no effect: {reason}")
    elif key not in _SILENT:
        special.warn(key, f"no effect: {name} has no such option")


def _search_clips(node: Node, name: str, known: dict[str, Option], pipeline: Pipeline) -> None:
    """Ranges of least error, which qplug looks for in what layers compute, not in weights."""
    if "clip" not in known:
        raise node.place.error(f"{name} searches no ranges", ["minmax", "method GPTQ or Awq"])
    pipeline.options.setdefault(name, {}).setdefault("clip", True)
