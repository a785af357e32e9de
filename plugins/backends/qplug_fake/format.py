"""Stores dequantized weights in a plain float checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qplug import Format, QplugError, QuantArgs, QuantizedWeight, Scheme, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


class DequantizedFloat(Format):
    """Stores float weights with the values of the codes, and the scales of static inputs."""

    is_lossless = False

    def layout(self, shape: tuple[int, int], scheme: Scheme, dtype: str) -> dict[str, TensorSpec]:
        packed = {"weight": TensorSpec(dtype, shape)}
        if scheme.static_inputs:  # loaders ignore the scale; qplug's reader rounds with it
            packed["input_scale"] = TensorSpec("float32", (1,))
        return packed

    def pack(self, weight: QuantizedWeight, scheme: Scheme, dtype: str) -> dict[str, Tensor]:
        import torch

        from qplug.numerics import dequantize

        packed = {"weight": dequantize(weight).to(getattr(torch, dtype))}
        if weight.input_scale is not None:
            packed["input_scale"] = weight.input_scale
        return packed

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        raise QplugError("a folder of the fake backend contains no codes to unpack")

    def dequantize(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
        return tensors["weight"].float()

    def refuses_cache(self, cache: QuantArgs) -> str | None:
        return None
