"""Refuses experts that are no wider than a group, for which vLLM computes garbage."""

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


def experts_are_wider_than_groups(case: Case) -> Iterator[Problem]:
    """Every expert is wider than a group: vLLM loads narrower ones, but serves garbage."""
    narrow = narrow_expert(case.model.linears, case.schemes)
    if narrow is not None:
        yield Problem("kernel", *narrow)
