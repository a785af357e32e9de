"""Refuses experts that vLLM cannot load, and those for which it computes garbage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qplug import Problem, Scheme
from qplug_compressed_tensors.configuration import PACK_QUANTIZED, format_of
from qplug_compressed_tensors.rules import Case

#: The names of the projections whose scales vLLM reorders.
_INTO_EXPERTS = ("gate_proj", "up_proj", "w1", "w3")


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


def unserved_expert(schemes: Mapping[str, Scheme]) -> tuple[str, str] | None:
    """The first expert that vLLM 0.33 cannot load, and the reason; None if it loads all.

    Its experts with int4 weights and int8 inputs are stored as a byte each (``W4A8Int8MoE``), and
    Humming, which runs integers of other widths than 4 and 8 bits, takes experts in groups alone.
    """
    for name, scheme in schemes.items():
        weights, inputs = scheme.weights, scheme.activations
        if ".experts." not in name or format_of(scheme) != PACK_QUANTIZED:
            continue
        if inputs is not None and not inputs.is_float:
            return name, f"vLLM runs no experts in {scheme.name}; try W4A16 or W8A8"
        if weights.bits not in (4, 8) and weights.strategy != "group":
            return name, f"vLLM runs experts in {scheme.name} in groups alone: add --group-size 64"
    return None


def experts_have_a_kernel(case: Case) -> Iterator[Problem]:
    """Every expert has a layout that vLLM loads."""
    unserved = unserved_expert(case.schemes)
    if unserved is not None:
        yield Problem("kernel", *unserved)


def experts_are_wider_than_groups(case: Case) -> Iterator[Problem]:
    """Every expert is wider than a group: vLLM loads narrower ones, but serves garbage."""
    narrow = narrow_expert(case.model.linears, case.schemes)
    if narrow is not None:
        yield Problem("kernel", *narrow)
