"""Reads an LLMC YAML file as a job.

This module reads ``base``, ``model``, ``save``, ``ignored_layers`` and ``mix_bits``; the other
modules of this folder read the sections that they are named for.
"""

from __future__ import annotations

import re
from pathlib import Path

from qplug.api.scheme import Scheme
from qplug.recipe.llmc.data import read_calibration, read_measurements
from qplug.recipe.llmc.method import read_method
from qplug.recipe.llmc.scheme import cache_of, observer_of, read_scheme, rounds_as_qtorch
from qplug.recipe.recipe import Calibration, Export, Job, Measurement, Propagation, Recipe
from qplug.recipe.spellings import parse_cache
from qplug.recipe.yaml_tree import Node, Section
from qplug.registry.registry import Registry

#: Top-level keys that only an LLMC file has.
SIGNS = ("base", "calib", "quant", "save", "sparse")

_DTYPES = ("auto", "float16", "bfloat16", "float32", "float8_e4m3fn", "int8")

#: Keys of ``save``: the backend, and the folder below ``save_path`` ("" for ``save_path`` itself).
_SAVES = {
    "save_sgl": ("sglang", ""),
    "save_vllm": ("vllm", ""),
    "save_lightllm": ("lightllm", ""),
    "save_autoawq": ("awq", ""),
    "save_mlcllm": ("mlcllm", ""),
    "save_lightx2v": ("lightx2v", ""),
    "save_trtllm": ("trtllm", ""),
    "save_fake": ("fake", "fake_quant_model"),
    "save_trans": ("hf", "transformed_model"),
}
_OBSOLETE_SAVES = ("save_fp", "save_autogptq", "save_quant", "save_fp8")


def is_llmc(root: Node) -> bool:
    """Whether ``root`` is the content of an LLMC file, not of a native recipe."""
    return any(key in root.entries() for key in SIGNS)


def read_llmc(root: Node, registry: Registry, warnings: list[str]) -> Job:
    """Read the job in an LLMC file; ``warnings`` receives a warning for each key without effect.

    Raises QplugError, with file and line, for wrong values and for keys that qplug does not
    support.
    """
    top = Section(root, warnings)
    for key in ("sparse", "token_reduction"):
        if key in top:
            raise top.need(key).place.error("qplug quantizes, but does not prune", ["quant"])
    base = top.section("base")
    seed = base.whole("seed") if base is not None else None
    if base is not None:
        base.warn_of_rest()
    quant = _language(top.need("quant"), warnings)
    pipeline = read_method(quant, registry)
    scheme = read_scheme(quant, _special_kind(quant))
    weight, act = quant.section("weight"), quant.section("act")
    overrides, ignore = _mix_bits(quant)
    kvcache = quant.section("kvcache")
    propagate: Propagation = "quantized" if quant.switch("quant_out") else "float"
    if (quant.whole("tp") or 1) != 1:
        quant.warn("tp", "no effect: engines split weights themselves")
    if "quant_objects" in quant:
        quant.warn("quant_objects", "no effect: qplug quantizes linear layers")
    quant.warn_of_rest()
    calib = top.section("calib")
    calibration = Calibration(propagate=propagate, observer=observer_of(act))
    if calib is not None:
        calibration = read_calibration(calib, calibration)
    elif any(registry.algorithms[name].needs_data for name in pipeline.algorithms):
        warnings.append(f"{top.place}: no calib section: qplug calibrates on the dataset demo")
    measurements = _measurements(top, warnings)
    ignored = top.section("ignored_layers")
    exports = _exports(top.section("save"))
    if "opencompass" in top:
        top.warn("opencompass", "no effect: qplug measures perplexity")
    places = dict(pipeline.places)
    if calib is not None:
        places["calibration"] = str(calib.place)
    places |= {f"exports.{n}": place for n, (_, place) in enumerate(exports)}
    places |= {f"measurements.{n}": place for n, (_, place) in enumerate(measurements)}
    job = Job(
        model=_model(top.section("model")),
        recipe=Recipe(
            algorithms=tuple(pipeline.algorithms),
            algorithm_options={name: own for name, own in pipeline.options.items() if own},
            scheme=scheme,
            overrides=overrides,
            ignore=(*ignore, *(_ignored(ignored) if ignored is not None else ())),
            calibration=calibration,
            kv_cache=parse_cache(cache_of(kvcache)) if kvcache is not None else None,
            use_qtorch=rounds_as_qtorch(scheme, weight, act),
            seed=seed or 0,
        ),
        exports=tuple(export for export, _ in exports),
        measurements=tuple(measurement for measurement, _ in measurements),
        places=places,
    )
    top.warn_of_rest()
    return job


# --- model ----------------------------------------------------------------------------------------


def _model(model: Section | None) -> str | None:
    if model is None:
        return None
    # qplug reads the architecture from config.json, and takes whichever tokenizer loads.
    model.leave("type", "use_cpu_to_save_cuda_mem_for_catcher", "block_wise_quant")
    model.word("tokenizer_mode", ["slow", "fast"])
    dtype = model.get("torch_dtype")
    if dtype is not None:
        name = str(dtype.scalar()).removeprefix("torch.")
        if name not in _DTYPES:
            allowed = ["auto", *(f"torch.{name}" for name in _DTYPES[1:])]
            raise dtype.place.error(f"{dtype.scalar()!r} is wrong", allowed)
        if name not in ("auto", "float8_e4m3fn"):
            model.warn("torch_dtype", "no effect: weights keep the dtype of the checkpoint")
    if "lora_path" in model:
        raise model.need("lora_path").place.error("qplug reads no adapter: merge it into the model")
    path = model.word("path")
    model.warn_of_rest()
    return path


# --- quant ----------------------------------------------------------------------------------------


def _language(node: Node, warnings: list[str]) -> Section:
    """The ``quant`` section, or its subsection about the language model."""
    quant = Section(node, warnings)
    for key in ("vision", "video_gen", "audio"):
        if key in quant:
            raise quant.need(key).place.error("qplug quantizes language models", ["language"])
    language = quant.section("language")
    if language is None:
        return quant
    quant.warn_of_rest()
    return language


def _special_kind(quant: Section) -> str | None:
    """The ``quant_type`` under ``special``, where older files have it; None without it."""
    special = quant.section("special", "speical")
    node = special.get("quant_type") if special is not None else None
    return None if node is None else node.word().replace("_", "-")


def _mix_bits(quant: Section) -> tuple[tuple[tuple[str, Scheme], ...], tuple[str, ...]]:
    """The overrides and the ignored layers of ``mix_bits``, from names like ``down_proj#0-1``."""
    mixed = quant.section("mix_bits")
    overrides: list[tuple[str, Scheme]] = []
    ignore: list[str] = []
    for key in mixed or ():
        assert mixed is not None
        setting = Section(mixed.need(key), quant.warnings)
        patterns = [_mixed_pattern(item) for item in setting.need("layer_name").items()]
        if setting.switch("do_quant", default=True):
            scheme = read_scheme(setting, None)
            overrides += [(pattern, scheme) for pattern in patterns]
        else:
            ignore += patterns
        setting.warn_of_rest()
    return tuple(overrides), tuple(ignore)


def _mixed_pattern(item: Node) -> str:
    name, _, blocks = item.word().partition("#")
    if not blocks:
        return f"*{name}"
    if not re.fullmatch(r"\d+(-\d+)*", blocks):
        raise item.place.error(f"{item.word()!r} is wrong", "NAME, or NAME#0-1-2 for some blocks")
    return rf"re:.*\.({blocks.replace('-', '|')})\.(.*\.)?{re.escape(name)}"


# --- layers that stay float -----------------------------------------------------------------------


def _ignored(section: Section) -> list[str]:
    blocks = [number for item in _list(section, "block_ids") for number in _blocks(item)]
    names = [item.word() for item in _list(section, "layer_names")]
    special = [item.word() for item in _list(section, "speical_names", "special_names")]
    section.warn_of_rest()
    patterns = list(special)
    if blocks:
        inner = "|".join(map(re.escape, names)) if names else ".*"
        numbers = "|".join(map(str, dict.fromkeys(blocks)))
        patterns.append(rf"re:.*\.({numbers})\.({inner})")
    elif names:
        patterns += [f"*.{name}" for name in names]
    return patterns


def _list(section: Section, *keys: str) -> tuple[Node, ...]:
    node = section.get(*keys)
    return () if node is None else node.items()


def _blocks(item: Node) -> range:
    numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", str(item.scalar()))
    if numbers is None:
        raise item.place.error(f"{item.scalar()!r} is wrong", "a number, or a range such as 4-9")
    first = int(numbers[1])
    return range(first, int(numbers[2] or first) + 1)


# --- eval and save --------------------------------------------------------------------------------


def _measurements(top: Section, warnings: list[str]) -> list[tuple[Measurement, str]]:
    node = top.get("eval")
    return [] if node is None else read_measurements(node, warnings)


def _exports(save: Section | None) -> list[tuple[Export, str]]:
    """The folders to write, outer folders first, each with the place of its key."""
    if save is None:
        return []
    path = save.get("save_path")
    save.leave("trtllm_cfg")
    asked = [key for key in _SAVES if save.switch(key)]
    for key in _OBSOLETE_SAVES:
        if key in save:
            if save.need(key).plain() is True:
                save.warn(key, "no effect: LLMC has no such format")
            save.leave(key)
    if {"save_sgl", "save_vllm"} <= set(asked):
        asked.remove("save_vllm")
        save.warn("save_vllm", "no effect: vLLM loads the folder for SGLang too")
    exports: list[tuple[Export, str]] = []
    for key in asked:
        backend, folder = _SAVES[key]
        if path is None:
            raise save.place.error(f"{key} needs a save_path; add it")
        out = Path(path.word()) / folder
        if any(export.out == out for export, _ in exports):
            raise save.need(key).place.error(f"another key already writes {out}", "one of them")
        exports.append((Export(out, backend), str(save.need(key).place)))
    save.warn_of_rest()
    return exports
