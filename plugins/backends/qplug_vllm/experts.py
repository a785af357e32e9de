"""Refuses experts that vLLM cannot load, and those for which it computes garbage."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from qplug import Problem, Scheme
from qplug_compressed_tensors.configuration import PACK_QUANTIZED, format_of
from qplug_compressed_tensors.loader import Loader
from qplug_compressed_tensors.rules import Case

#: The names of the projections whose scales vLLM reorders.
_INTO_EXPERTS = ("gate_proj", "up_proj", "w1", "w3")
#: The width of hidden states is a multiple of this for Marlin (check_moe_marlin_supports_config).
_MARLIN_HIDDEN = 128


def narrow_expert(
    linears: Mapping[str, tuple[int, int]], schemes: Mapping[str, Scheme], processes: int = 1
) -> tuple[str, str] | None:
    """The first expert that vLLM computes wrong, and the reason; None if all are right.

    vLLM 0.26 reorders the scales of gate and up for a kernel by the width of the expert instead of
    the width of its input. So it treats an expert that is no wider than a group as a single group.
    ``processes``: the number of processes that share an expert.
    """
    for name, scheme in schemes.items():
        expert, _, local = name.rpartition(".")
        size = scheme.weights.group_size
        if ".experts." not in expert or local not in _INTO_EXPERTS or size is None:
            continue
        out, width = linears[name]
        if format_of(scheme) == PACK_QUANTIZED and out // processes <= size < width:
            wide = f"{out // processes} wide" + (" in each process" if processes > 1 else "")
            return name, (
                f"vLLM mixes up the scales of experts that are {wide}, no wider than a group of "
                f"{size}: take a smaller --group-size, or -1"
            )
    return None


def unserved_expert(
    linears: Mapping[str, tuple[int, int]],
    schemes: Mapping[str, Scheme],
    loader: Loader,
    device: str = "any",
) -> tuple[str, str] | None:
    """The first expert that vLLM cannot load on ``device``, and the reason; None if it loads all.

    Its experts with int4 weights and int8 inputs are stored as a byte each (``W4A8Int8MoE``).
    ``loader``: what the loader of a version reads.
    """
    for name, scheme in schemes.items():
        inputs = scheme.activations
        if ".experts." not in name or format_of(scheme) != PACK_QUANTIZED:
            continue
        if inputs is not None and not inputs.is_float:
            return name, f"vLLM runs no experts in {scheme.name}; try W4A16 or W8A8"
        if scheme.weights.strategy != "group" and loader.row_experts is not None:
            sentence = _without_groups(name, linears[name], scheme, loader.row_experts, device)
            if sentence is not None:
                return name, sentence
    return None


def _without_groups(
    name: str,
    shape: tuple[int, int],
    scheme: Scheme,
    runs: Collection[tuple[str, str]],
    device: str,
) -> str | None:
    """Why vLLM does not run the expert ``name`` with one scale a row; None if it does.

    ``runs``: the schemes and devices of the only kernel that does, which is Marlin's. ``device``:
    where the folder is to be served.
    """
    devices = [at for kind, at in runs if kind == scheme.name]
    alone = f"vLLM runs experts in {scheme.name}"
    if not devices:
        return f"{alone} in groups alone: add --group-size 64"
    if device not in ("any", *devices):
        return f"{alone} in groups alone on {device}: add --group-size 64"
    out, width = shape
    hidden = width if name.rpartition(".")[2] in _INTO_EXPERTS else out
    if hidden % _MARLIN_HIDDEN:
        return (
            f"{alone} in groups alone if hidden states are {hidden} wide, no multiple of "
            f"{_MARLIN_HIDDEN}: add --group-size 32"
        )
    return None


def experts_have_a_kernel(case: Case) -> Iterator[Problem]:
    """Every expert has a layout that vLLM loads."""
    unserved = unserved_expert(case.model.linears, case.schemes, case.loader)
    if unserved is not None:
        yield Problem("kernel", *unserved)


def experts_are_wider_than_groups(case: Case) -> Iterator[Problem]:
    """Every expert is wider than a group: vLLM loads narrower ones, but serves garbage."""
    narrow = narrow_expert(case.model.linears, case.schemes)
    if narrow is not None:
        yield Problem("kernel", *narrow)
