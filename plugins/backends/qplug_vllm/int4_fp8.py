"""Computes the weight that vLLM's kernel for int4 weights and fp8 inputs multiplies with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qplug import FLOAT_MAX, QuantizedWeight

if TYPE_CHECKING:
    from torch import Tensor

#: The smallest unit of a row: vLLM computes units as it computes the scale of a token.
_LEAST_UNIT = 1 / (FLOAT_MAX["e4m3"] * 512)


def multiplied(weight: QuantizedWeight) -> Tensor:
    """The float32 weight ``[out, in]`` that Cutlass's kernel multiplies with for ``weight``.

    The kernel takes a unit for each row, 1/448 of the row's largest scale, and rounds scales to
    e4m3 multiples of the unit. Tensor cores need fp8 on both sides, so the kernel also rounds the
    product of a code and an eighth of its scale to e4m3: 5 times 1.125 becomes 5.5. Both roundings
    were read in vLLM 0.26 (``convert_bf16_scales_to_fp8``, ``cutlass_pack_scale_fp8``); with both,
    qplug's reader agrees with the engine.
    """
    unit = (weight.scale.amax(1, keepdim=True) / FLOAT_MAX["e4m3"]).clamp_(min=_LEAST_UNIT)
    eighth = _rounded(_rounded(weight.scale / unit) / 8).unsqueeze(-1)
    groups = weight.codes.float().unflatten(1, (weight.scale.shape[1], -1))
    return (_rounded(groups * eighth) * (8 * unit.unsqueeze(-1))).flatten(1)


def _rounded(values: Tensor) -> Tensor:
    import torch

    return values.to(torch.float8_e4m3fn).float()
