"""Reads LLMC's ``quant.method`` and ``quant.special`` as a pipeline of algorithms with options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qplug.api.params import Option, by_all_names, convert, options
from qplug.errors import QplugError
from qplug.recipe.yaml_tree import Node, Section
from qplug.registry.registry import Registry

#: The names of qplug's algorithms for LLMC's methods.
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

#: Keys whose values do not matter: memory, files between steps, and choices that qplug has fixed.
_SILENT = (
    *("awq_bs", "save_mem", "chunk_num", "reduce_memory", "clip_path", "scale_path", "fp32_had"),
    *("clip_version", "do_gqa_trans", "search_clip_init", "quant_type", "n_outs"),
)

#: Keys without an option: the harmless values, and the reason for a warning about any other value.
_DIFFERENT: dict[str, tuple[tuple[Any, ...], str]] = {
    "static_groups": ((True,), "groups always consist of neighbouring columns, as engines need"),
    "axis": ((1,), "groups always consist of neighbouring columns, as engines need"),
    "weight_clip": ((False,), "this algorithm searches no clips; put awq before it"),
    "online_rotate": ((False,), "the folder of step 1 says which inputs are rotated"),
    "save_clip": ((False,), "qplug keeps no clips in files: use awq+omniquant in one recipe"),
    "save_scale": ((False,), "qplug keeps no scales in files: use awq+omniquant in one recipe"),
    "deactive_amp": ((True,), "the algorithm decides the precision of learning"),
    "use_shift": ((False,), "this algorithm moves no offsets"),
}

#: Keys by which a method continues from the results of an earlier AWQ run: qplug runs AWQ first.
_AFTER_AWQ = ("load_clip", "search_scale_init", "load_transform")


@dataclass
class Pipeline:
    """Algorithms in order, the options of each by name, and places by the names of Job.places."""

    algorithms: list[str]
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)


def read_method(quant: Section, registry: Registry) -> Pipeline:
    """Read the pipeline in a ``quant`` section.

    Raises QplugError, with file and line, if qplug has no such algorithm, or for a wrong option.
    """
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
    """The name of qplug's algorithm for a ``method``."""
    given = node.word()
    for method, name in METHODS.items():
        if method.lower() == given.lower():
            return name
    installed = set(registry.algorithms)
    allowed = [method for method, name in METHODS.items() if name in installed]
    raise node.place.error(f"qplug has no method {given!r}", allowed)


def _read_special(
    special: Section, name: str, known: dict[str, Option], symmetric: bool, pipeline: Pipeline
) -> None:
    own = pipeline.options.setdefault(name, {})
    for key in special:
        node, option = special.get(key), known.get(key)
        if node is None or _is_of_pipeline(special, key, node, pipeline):
            continue
        if option is None:
            _warn_of_difference(special, key, node, name, symmetric)
            continue
        if option.name in own:
            raise node.place.error(f"sets the option {option.name!r} of {name} again; remove one")
        own[option.name] = convert(option, node.plain(), f"{node.place}: {node.plain()}")


def _is_of_pipeline(special: Section, key: str, node: Node, pipeline: Pipeline) -> bool:
    """Whether ``key`` decides which algorithms run; if so, it takes effect on ``pipeline``."""
    if key == "owq" and node.switch():
        raise node.place.error("qplug keeps no columns float", ["False"])
    if key in _AFTER_AWQ and node.switch() and "awq" not in pipeline.algorithms:
        pipeline.algorithms.insert(0, "awq")
        special.warn(key, "qplug reads no such file: awq runs first and passes its results on")
    return key == "owq" or key in _AFTER_AWQ


def _warn_of_difference(special: Section, key: str, node: Node, name: str, symmetric: bool) -> None:
    """Warn about a key without an option, if its value changes the result in LLMC."""
    if key == "clip_sym":
        if node.switch() != symmetric:
            special.warn(key, "no effect: clips are symmetric if the weights are")
    elif key in _DIFFERENT:
        harmless, reason = _DIFFERENT[key]
        if node.plain() not in harmless:
            special.warn(key, f"no effect: {reason}")
    elif key not in _SILENT:
        special.warn(key, f"no effect: {name} has no such option")


def _search_clips(node: Node, name: str, known: dict[str, Option], pipeline: Pipeline) -> None:
    """Turn on the search for clips of least error: qplug compares outputs, LLMC weights."""
    if "clip" not in known:
        raise node.place.error(f"{name} searches no clips", ["minmax", "method GPTQ or Awq"])
    pipeline.options.setdefault(name, {}).setdefault("clip", True)
