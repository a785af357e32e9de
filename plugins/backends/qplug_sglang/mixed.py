"""Several schemes in one folder of ModelOpt: ``quant_algo`` is ``MIXED_PRECISION``.

``quantized_layers`` names each quantized linear and its scheme. SGLang looks a module up by its
whole name, and leaves it float if it finds none: it would then take the codes of fp8 for weights,
without a word. So the names here are those by which SGLang may ask. It knows which linears are
merged for some classes of models alone, so merged matrices have entries of their own. qplug reads
all of ``members.ALGORITHMS``, and writes those beside NVFP4 that every release reads alike: for the
scales of blocks SGLang and vLLM have other names and shapes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qplug import ModelView, Problem, QplugError, Scheme
from qplug_compressed_tensors.fusing import merged_matrices, with_merged_names
from qplug_compressed_tensors.outside import portable
from qplug_sglang.members import ALGORITHMS, FP8, NVFP4, NVFP4_A16
from qplug_sglang.splitting import SPLITS_MERGED_NAMES

if TYPE_CHECKING:
    from qplug import Checkpoint

MIXED = "MIXED_PRECISION"
#: One of them must be in a mixed folder: SGLang takes others for W4AFP8.
FOUR_BITS = (NVFP4, NVFP4_A16)

#: What composite models have around the list of their blocks, in checkpoints and in SGLang, which
#: moves a model from one to another by ``hf_to_sglang_mapper`` and by ``add_prefix``.
_AROUND = ("model.language_model.", "language_model.model.", "language_model.", "model.")


def refuses_mixture(
    model: ModelView, schemes: Mapping[str, Scheme], written: Collection[Scheme]
) -> str | None:
    """Why ``schemes``, by linear, cannot be in one folder, as a sentence; None if they can.

    ``written``: the schemes that are stored in this format, of which ``schemes`` has one at least.
    """
    others = sorted({s.name for s in schemes.values() if s not in (*written, FP8)})
    if others:
        own = next(scheme.name for scheme in schemes.values() if scheme in written)
        return (
            f"{own} is stored in ModelOpt's format, which has {FP8.name} beside it, not "
            f"{' and '.join(others)}; take --backend compressed-tensors for both in one folder"
        )
    if not is_mixed(schemes):
        return None
    blocks = tuple(f"{block}." for block in model.blocks)
    for name in schemes:
        if not name.startswith(blocks):
            where = "SGLang may have another name for a linear outside of the blocks"
            return f"{name}: {where}, in {_kinds(schemes)}; add --ignore {name}"
        if portable(name) != name and not name.startswith(_AROUND[:2]):
            where = "SGLang may have another name for it"
            return f"{name}: {where}, in {_kinds(schemes)}; take NVFP4 for all"
    apart = next(shared_apart(model, schemes), None)
    return None if apart is None else ": ".join(apart)


def is_mixed(schemes: Mapping[str, Scheme]) -> bool:
    """Whether ``schemes``, by linear, need an entry for each linear.

    NVFP4 in all needs none. Only the newest SGLang reads NVFP4A16 without one.
    """
    return {*schemes.values()} != {NVFP4}


def _kinds(schemes: Mapping[str, Scheme]) -> str:
    """``a mixture of FP8 and NVFP4``, or ``NVFP4A16`` alone."""
    names = sorted({scheme.name for scheme in schemes.values()})
    return names[0] if len(names) == 1 else f"a mixture of {' and '.join(names)}"


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
    for scheme in dict.fromkeys(ALGORITHMS.values()):
        algorithm = next(name for name, meant in ALGORITHMS.items() if meant == scheme)
        entry: dict[str, Any] = {"quant_algo": algorithm}
        if scheme in FOUR_BITS:
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
    algorithm, size = told.get("quant_algo"), told.get("group_size")
    scheme = scheme_of(algorithm, size)
    if scheme is None:
        groups = "" if size is None else f" in groups of {size}"
        raise QplugError(
            f"qplug reads {', '.join(ALGORITHMS)} in modelopt's {MIXED}, not {name} with "
            f"quant_algo {algorithm!r}{groups}"
        )
    return scheme


def scheme_of(algorithm: object, size: object) -> Scheme | None:
    """The scheme of a ``quant_algo`` with groups or blocks of ``size``; None if qplug has none."""
    scheme = ALGORITHMS.get(str(algorithm).upper())
    if scheme is None:
        return None
    weights = scheme.weights
    own = weights.block[0] if weights.block is not None else weights.group_size
    return scheme if size is None or own is None or size == own else None


def mixture_problems(
    folder: Checkpoint, model: ModelView, schemes: Mapping[str, Scheme]
) -> Iterator[Problem]:
    """Yield a problem for each rule of mixed folders alone that ``folder`` breaks.

    ``schemes``: of the quantized linears, by name.
    """
    for name, what in shared_apart(model, schemes):
        yield Problem("fused", name, what)
    if not {*schemes.values()} & {*FOUR_BITS}:
        where, what = "quantized_layers", "SGLang takes a mixture without NVFP4 for W4AFP8"
        yield Problem("format", where, what)
    config = folder.config["quantization_config"]
    config = config.get("quantization") or config
    if {*(folder.config.get("architectures") or ())} & SPLITS_MERGED_NAMES:
        return
    layers = layers_of(config)
    linears = [name for name in model.linears if name in layers and ".experts." not in name]
    for members in merged_matrices(linears):
        for name in with_merged_names(members)[len(members) :]:
            if layers.get(name) != layers[members[0]]:
                what = f"must be in quantized_layers like {', '.join(members)}: SGLang looks it up"
                yield Problem("merged", name, what)
