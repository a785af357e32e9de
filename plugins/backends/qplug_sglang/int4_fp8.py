"""Refuses int4 weights with fp8 inputs where SGLang does not run them, which is outside of experts.

Its class for such experts (``CompressedTensorsW4AFP8MoE``) asks the configuration for the group of
the class ``Linear``, and for one format in the folder. It computes one scale for the inputs of all
experts as the model runs, where the scheme has one for each token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qplug import PRESETS, Problem, Scheme
from qplug_compressed_tensors.rules import Case

_INT4_FP8 = PRESETS["W4AFP8"]


def unserved(schemes: Mapping[str, Scheme]) -> tuple[str, str] | None:
    """The first linear that SGLang cannot load beside experts in W4AFP8, and the reason.

    None if no linear has that scheme, or if all experts have it and all other linears are float.
    """
    coded = {name for name, scheme in schemes.items() if _is_int4_fp8(scheme)}
    for name, scheme in schemes.items() if coded else ():
        if ".experts." not in name and name in coded:
            return name, f"SGLang runs {scheme.name} in experts alone: add --ignore {name}"
        if name not in coded:
            what = f"SGLang runs experts in {_INT4_FP8.name} only where all other linears are float"
            return name, f"{what}, not {scheme.name}"
    return None


def _is_int4_fp8(scheme: Scheme) -> bool:
    inputs = scheme.activations
    return scheme.weights.dtype == "int4" and inputs is not None and inputs.is_float


def int4_fp8_is_of_experts(case: Case) -> Iterator[Problem]:
    """Only experts have int4 weights and fp8 inputs, in a group for the class ``Linear``."""
    found = unserved(case.schemes)
    if found is not None:
        yield Problem("kernel", *found)
        return
    for group in case.config.groups:
        if _is_int4_fp8(group.scheme) and "Linear" not in group.targets:
            sentence = f"{case.engine} asks for {group.scheme.name} in the group for Linear"
            yield Problem("order", ", ".join(group.targets), sentence)
