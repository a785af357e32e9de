"""Linears that SGLang does not take as packed codes, whatever their shape.

Two reasons, read from SGLang 0.5.16 and 0.5.23, the first and the second seen on a GPU with 0.5.16:

* The model's code reads ``weight`` of a latent projection itself: ``DeepseekV2AttentionMLA`` and
  ``post_load_weights`` of the models that have it, and of MiniCPM3 and Kimi Linear. Codes of which
  several are in a word have another tensor, and codes for Marlin are in another order.
* The kernel of experts computes SiLU alone: ``compressed_tensors_wNa16_moe.py`` and
  ``compressed_tensors_w4a8_fp8_moe.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from qplug import ModelView, Problem, Scheme
from qplug_compressed_tensors.rules import Case, text_part

#: Projections whose ``weight`` is read, if the module has the second one.
_READ = {
    "q_a_proj": "q_a_proj",
    "kv_a_proj_with_mqa": "q_a_proj",  # merged with it
    "q_b_proj": "q_b_proj",
    "kv_b_proj": "kv_b_proj",
}
_LATENT = "kv_b_proj"
_ACTIVATIONS = ("hidden_act", "hidden_activation", "mlp_hidden_act")
_SILU = ("silu", "swish")


def packed_in_vain(model: ModelView, schemes: Mapping[str, Scheme]) -> dict[str, str]:
    """Returns why SGLang does not run linears of ``schemes`` from packed codes, by name."""
    activation = _activation_of_experts(model)
    found = {}
    for name, scheme in schemes.items():
        if not _packs(scheme):
            continue
        if _is_read(name, model.linears):
            found[name] = f"SGLang reads its weight itself, which {scheme.name} packs"
        elif ".experts." in name and activation not in (None, *_SILU) and _by_marlin(scheme):
            found[name] = f"SGLang runs experts in {scheme.name} with SiLU alone, not {activation}"
    return found


def packed_problems(model: ModelView, schemes: Mapping[str, Scheme]) -> Iterator[Problem]:
    """Yield a problem for each linear of ``packed_in_vain``."""
    for name, sentence in packed_in_vain(model, schemes).items():
        yield Problem("kernel", name, sentence)


def latent_projections_are_unpacked(case: Case) -> Iterator[Problem]:
    """No linear is packed that SGLang reads itself, or whose kernel lacks the activation."""
    yield from packed_problems(case.model, case.schemes)


def _packs(scheme: Scheme) -> bool:
    """Whether the tensor that SGLang has for the codes is no matrix of numbers."""
    return scheme.activations is None or scheme.weights.bits < 8


def _by_marlin(scheme: Scheme) -> bool:
    """Whether experts go to ``compressed_tensors_wNa16_moe.py`` or the class for W4AFP8."""
    return not scheme.weights.is_float


def _is_read(name: str, linears: Iterable[str]) -> bool:
    parent, _, local = name.rpartition(".")
    needed = {_READ.get(local, ""), _LATENT}
    return local in _READ and all(f"{parent}.{other}" in linears for other in needed)


def _activation_of_experts(model: ModelView) -> str | None:
    """The name of the activation function in config.json; None if it is not told."""
    told = (
        part[key]
        for part in (text_part(model), model.config)
        for key in _ACTIVATIONS
        if key in part
    )
    activation = next(told, None)
    return None if activation is None else str(activation)
