"""Dequantized weights in a plain float checkpoint: to measure what no engine serves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qplug import (
    Exporter,
    ModelView,
    NoParams,
    QplugError,
    QuantArgs,
    QuantizedWeight,
    Scheme,
    TensorSpec,
)
from qplug.numerics import dequantize


class Fake(Exporter[NoParams]):
    """A float checkpoint that any loader takes; only its values are those of the codes."""

    name = "fake"
    exact = False
    rotates_online = True
    served = False

    def layout(self, shape: tuple[int, int], scheme: Scheme, dtype: str) -> dict[str, TensorSpec]:
        packed = {"weight": TensorSpec(dtype, shape)}
        if scheme.static_inputs:  # loaders ignore it; qplug's reader rounds with it
            packed["input_scale"] = TensorSpec("float32", (1,))
        return packed

    def pack(self, weight: QuantizedWeight, scheme: Scheme, dtype: str) -> dict[str, Tensor]:
        packed = {"weight": dequantize(weight).to(getattr(torch, dtype))}
        if weight.input_scale is not None:
            packed["input_scale"] = weight.input_scale
        return packed

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        raise QplugError("a fake-quantized weight holds no codes")

    def dequantize(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
        return tensors["weight"].float()

    def schemes(self, config: Mapping[str, Any], model: ModelView) -> dict[str, Scheme]:
        raise QplugError(f"{self.name}: a folder with a quantization_config is another backend's")

    def refuses_cache(self, cache: QuantArgs) -> str | None:
        return None

    def config(self, model: ModelView, schemes: Mapping[str, Scheme]) -> dict[str, Any] | None:
        return None
