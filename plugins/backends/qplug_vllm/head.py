"""The rule for a quantized head, which no other engine takes."""

from __future__ import annotations

from collections.abc import Iterator

from qplug import Problem
from qplug_compressed_tensors.configuration import matches
from qplug_compressed_tensors.rules import Case


def head_is_a_target(case: Case) -> Iterator[Problem]:
    """Outside the decoder blocks only a head is quantized, and a target names it.

    vLLM does not class a head as ``Linear``: without a target of its own, vLLM cannot place the
    codes of the head.
    """
    for name in case.schemes:
        if name in case.model.quantizable:
            continue
        if name != case.model.head:
            yield Problem("head", name, "is a router, and must stay float")
        elif not any(matches(target, name) for g in case.config.groups for target in g.targets):
            yield Problem("head", name, "is named in no config group: vLLM cannot place its codes")
