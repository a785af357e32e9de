"""What vLLM's kernel for int4 weights and fp8 inputs multiplies with: weights rounded to fp8."""

from __future__ import annotations

import torch
from torch import Tensor

from qplug import FLOAT_MAX, QuantizedWeight

#: No row has a smaller unit: vLLM finds it as it finds the scale of a token.
_LEAST_UNIT = 1 / (FLOAT_MAX["e4m3"] * 512)


def multiplied(weight: QuantizedWeight) -> Tensor:
    """The float32 weight ``[out, in]`` that Cutlass's kernel makes of ``weight``.

    Of each row it takes a unit, a 448th of the largest scale, and rounds scales to e4m3 multiples
    of it. Tensor cores want fp8 on both sides, so an eighth of a scale times a code is rounded to
    e4m3 too: 5 times 1.125 becomes 5.5. Read from vLLM 0.26 (``convert_bf16_scales_to_fp8``,
    ``cutlass_pack_scale_fp8``), and seen: the engine is where a reader is that rounds both.
    """
    unit = (weight.scale.amax(1, keepdim=True) / FLOAT_MAX["e4m3"]).clamp_(min=_LEAST_UNIT)
    eighth = _rounded(_rounded(weight.scale / unit) / 8).unsqueeze(-1)
    groups = weight.codes.float().unflatten(1, (weight.scale.shape[1], -1))
    return (_rounded(groups * eighth) * (8 * unit.unsqueeze(-1))).flatten(1)


def _rounded(values: Tensor) -> Tensor:
    return values.to(torch.float8_e4m3fn).float()
