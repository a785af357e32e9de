"""Shared experts that SGLang runs as one more of the routed experts, which then share a scheme.

``determine_num_fused_shared_experts`` of the models' code in SGLang 0.5.16 and 0.5.23 decides it. A
shared expert that is stored otherwise than the routed ones finds no parameters, and is passed over
in silence: GLM-4.7-Flash with float experts was served so on a GPU with 0.5.16, and wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qplug import ModelView, Problem, Scheme
from qplug_compressed_tensors.rules import Case, text_part

#: Types of models that do so on every GPU, and those that do if they have so many routed experts,
#: unless these are in int4.
_ALWAYS = ("glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm4v_moe_text", "minimax_m3")
_OF_256 = ("deepseek_v3", "glm_moe_dsa")
_SHARED, _ROUTED = ".shared_experts.", ".experts."


def divided_shared_expert(
    model: ModelView, schemes: Mapping[str, Scheme]
) -> tuple[str, str] | None:
    """A linear of a shared expert whose scheme is not that of the routed ones, and the reason."""
    config = text_part(model)
    of_256 = config.get("model_type") in _OF_256 and config.get("n_routed_experts") == 256
    if config.get("model_type") not in _ALWAYS and not of_256:
        return None
    routed: dict[str, Scheme | None] = {}
    for name in model.linears:
        layer, inside, _ = name.partition(_ROUTED)
        if inside:
            routed.setdefault(layer, schemes.get(name))
    for name in model.linears:
        layer, inside, _ = name.partition(_SHARED)
        if not inside or layer not in routed or schemes.get(name) == routed[layer]:
            continue
        other = routed[layer]
        if of_256 and other is not None and other.weights.dtype == "int4":
            continue
        kind = "float" if other is None else other.name
        return name, (
            f"SGLang runs the shared expert as one more of the routed ones, which are {kind}: "
            "give both one scheme, or keep both float"
        )
    return None


def shared_expert_problems(model: ModelView, schemes: Mapping[str, Scheme]) -> Iterator[Problem]:
    """Yield a problem for a shared expert whose scheme is not that of the routed ones."""
    found = divided_shared_expert(model, schemes)
    if found is not None:
        yield Problem("fused", *found)


def shared_experts_are_as_routed_ones(case: Case) -> Iterator[Problem]:
    """A shared expert has the scheme of the routed ones where SGLang runs it with them."""
    yield from shared_expert_problems(case.model, case.schemes)
