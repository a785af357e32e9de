"""Stores MXFP8: codes in e4m3, a byte each, and the exponent of the scale of each group of 32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qplug import QuantizedWeight, Scheme, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


def layout(shape: tuple[int, int], scheme: Scheme) -> dict[str, TensorSpec]:
    """The specs of the stored tensors of a weight of ``shape`` (out, in), by local name."""
    return {
        "weight": TensorSpec("float8_e4m3fn", shape),
        "weight_scale": TensorSpec("uint8", scheme.weights.scale_shape(shape)),
    }


def pack(weight: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
    """The stored tensors of ``weight``, as ``layout`` describes them, by local name."""
    import torch

    scale = weight.scale.to(torch.float8_e8m0fnu).view(torch.uint8)
    return {"weight": weight.codes, "weight_scale": scale}


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """The weight in ``tensors``: the exact inverse of ``pack``."""
    import torch

    scale = tensors["weight_scale"].view(torch.float8_e8m0fnu).float()
    return QuantizedWeight(tensors["weight"], scale, None, scheme.weights)
