"""NVFP4 and FP8 in one folder of ModelOpt: ``quant_algo`` is ``MIXED_PRECISION``.

``quantized_layers`` names each quantized linear and its scheme. SGLang looks a module up by its
whole name, and leaves it float if it finds none: it would then take the codes of fp8 for weights,
without a word. So the names here are those by which SGLang may ask. It knows which linears are
merged for some classes of models alone, so merged matrices have entries of their own. Other schemes
that its loader knows (``FP8_PB_WO``, ``MXFP8``, ``W4A16_NVFP4``) are not written by qplug.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qplug import PRESETS, ModelView, Problem, QplugError, Scheme
from qplug_compressed_tensors.fusing import merged_matrices, with_merged_names
from qplug_compressed_tensors.outside import portable
from qplug_sglang.splitting import SPLITS_MERGED_NAMES

if TYPE_CHECKING:
    from qplug import Checkpoint

MIXED = "MIXED_PRECISION"
NVFP4, FP8 = PRESETS["NVFP4"], PRESETS["FP8"]
#: The ``quant_algo`` of a linear, and what it means.
ALGORITHMS = {"NVFP4": NVFP4, "FP8": FP8}

#: What composite models have around the list of their blocks, in checkpoints and in SGLang, which
#: moves a model from one to another by ``hf_to_sglang_mapper`` and by ``add_prefix``.
_AROUND = ("model.language_model.", "language_model.model.", "language_model.", "model.")


def refuses_mixture(model: ModelView, schemes: Mapping[str, Scheme]) -> str | None:
    """Why NVFP4 and what stands beside it cannot be in one folder, as a sentence; None if it can.

    ``schemes``: by linear, NVFP4 among them.
    """
    others = sorted({s.name for s in schemes.values() if s not in ALGORITHMS.values()})
    if others:
        return (
            f"NVFP4 is stored in ModelOpt's format, which has {FP8.name} beside it, not "
            f"{' and '.join(others)}; take --backend compressed-tensors for both in one folder"
        )
    if len({*schemes.values()}) < 2:
        return None
    blocks = tuple(f"{block}." for block in model.blocks)
    for name in schemes:
        if not name.startswith(blocks):
            where = "SGLang may have another name for a linear outside of the blocks"
            return f"{name}: {where}, where NVFP4 and FP8 are mixed; add --ignore {name}"
        if portable(name) != name and not name.startswith(_AROUND[:2]):
            where = "SGLang may have another name for it"
            return f"{name}: {where}, where NVFP4 and FP8 are mixed; take one scheme"
    apart = next(shared_apart(model, schemes), None)
    return None if apart is None else ": ".join(apart)


def shared_apart(model: ModelView, schemes: Mapping[str, Scheme]) -> Iterator[tuple[str, str]]:
    """Yield each linear of a shared expert whose scheme is not that of the experts beside it.

    SGLang makes a shared expert one of the others (qwen2_moe.py, deepseek_v2.py): its configuration
    of mixed folders does not say, as that of NVFP4 alone does, that they differ.
    """
    routed = {
        name.partition(".experts.")[0]: schemes.get(name)
        for name in model.linears
        if ".experts." in name
    }
    for name in model.linears:
        for shared in (".shared_expert.", ".shared_experts."):
            layer, found, _ = name.partition(shared)
            scheme = schemes.get(name)
            if found and layer in routed and routed[layer] != scheme:
                own, theirs = (each.name if each else "float" for each in (scheme, routed[layer]))
                what = f"is {own}, and the experts that SGLang may fuse it with are {theirs}"
                yield name, f"{what}: give both one scheme"


def quantized_layers(schemes: Mapping[str, Scheme]) -> dict[str, dict[str, Any]]:
    """The entries of ``quantized_layers``: linears and merged matrices, in all their spellings."""
    layers: dict[str, dict[str, Any]] = {}
    for algorithm, scheme in ALGORITHMS.items():
        entry: dict[str, Any] = {"quant_algo": algorithm}
        if scheme.weights.group_size is not None:
            entry["group_size"] = scheme.weights.group_size
        for name in with_merged_names(name for name in schemes if schemes[name] == scheme):
            layers |= dict.fromkeys(_spellings(name), entry)
    return dict(sorted(layers.items()))


def _spellings(name: str) -> list[str]:
    local = portable(name)
    return [name] if local == name else [name, *(around + local for around in _AROUND)]


def layers_of(config: Mapping[str, Any]) -> Mapping[str, Scheme]:
    """The scheme of each name in ``quantized_layers``. Raises QplugError if qplug has none for it.

    ``config``: a ``quantization_config``.
    """
    layers = config.get("quantized_layers")
    if not isinstance(layers, dict) or not layers:
        raise QplugError(f"quantization_config: {MIXED} has no quantized_layers")
    return {name: _scheme(name, entry) for name, entry in layers.items()}


def _scheme(name: str, entry: object) -> Scheme:
    told = entry if isinstance(entry, dict) else {}
    scheme = ALGORITHMS.get(str(told.get("quant_algo")).upper())
    size = told.get("group_size", NVFP4.weights.group_size)
    if scheme is None or (scheme == NVFP4 and size != NVFP4.weights.group_size):
        raise QplugError(
            f"qplug reads NVFP4 in groups of 16 and FP8 in modelopt's {MIXED}, not {name} with "
            f"quant_algo {told.get('quant_algo')!r} in groups of {size}"
        )
    return scheme


def mixture_problems(
    folder: Checkpoint, model: ModelView, schemes: Mapping[str, Scheme]
) -> Iterator[Problem]:
    """Yield a problem for each rule of mixed folders alone that ``folder`` breaks.

    ``schemes``: of the quantized linears, by name.
    """
    for name, what in shared_apart(model, schemes):
        yield Problem("fused", name, what)
    if NVFP4 not in schemes.values():
        where, what = "quantized_layers", "SGLang takes a mixture without NVFP4 for W4AFP8"
        yield Problem("format", where, what)
    config = folder.config["quantization_config"]
    if {*(folder.config.get("architectures") or ())} & SPLITS_MERGED_NAMES:
        return
    layers = layers_of(config)
    linears = [name for name in model.linears if name in layers and ".experts." not in name]
    for members in merged_matrices(linears):
        for name in with_merged_names(members)[len(members) :]:
            if layers.get(name) != layers[members[0]]:
                what = f"must be in quantized_layers like {', '.join(members)}: SGLang looks it up"
                yield Problem("merged", name, what)
