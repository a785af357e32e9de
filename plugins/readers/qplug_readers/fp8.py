"""Checkpoints in fp8 as transformers, DeepSeek, Mistral and FBGEMM publish them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qplug import PRESETS, QuantArgs, Reader, StoredTensor
from qplug_readers.float4 import mxfp4_weight
from qplug_readers.float8 import FLOAT8, float8_weight
from qplug_readers.modules import Module, read_modules

#: The names of the scales of a tensor: each is a suffix, or replaces the name ``weight``.
_SUFFIXES, _INSTEAD = ("_scale_inv", "_scale"), ("scale", "qscale_weight")
_INPUTS = ("input_scale", "activation_scale", "qscale_act")


class FP8Reader(Reader):
    """Reads fp8 with scales for tensors, rows or blocks, and DeepSeek-V4's experts in fp4.

    ``X.weight`` is float8, and the product of it and its scales is the weight: of
    ``X.weight_scale_inv`` (which is a factor in spite of its name), ``X.weight_scale`` or
    ``X.scale``. An int8 ``X.weight`` holds two e2m1 in a byte.
    """

    name = "fp8"

    def reads(self, config: Mapping[str, Any]) -> bool:
        return self.quantization(config).get("quant_method") in ("fp8", "fbgemm_fp8")

    def as_float(
        self, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
    ) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        quantization, dtype = self.quantization(config), self.float_dtype(config)
        block = _block(quantization)
        inputs = _activations(quantization, block)

        def floats_of(module: Module) -> dict[str, StoredTensor]:
            made: dict[str, StoredTensor] = {}
            for local, tensor in module.tensors.items():
                scale = _scale_name(module, local)
                if tensor.spec.dtype in FLOAT8:
                    stored = next(filter(None, map(module.tensors.get, _INPUTS)), None)
                    made[local] = float8_weight(
                        module,
                        local,
                        scale,
                        dtype,
                        block=block,
                        activations=inputs,
                        input_scale=stored if inputs is not None and not inputs.dynamic else None,
                    )
                elif tensor.spec.dtype == "int8" and scale in module.tensors:
                    made[local] = mxfp4_weight(module, local, scale, dtype)
            return made

        return self.without_quantization(config), read_modules(tensors, floats_of, self.name)

    def describe(self, config: Mapping[str, Any]) -> str:
        block = _block(self.quantization(config))
        words = "fp8" if block is None else f"fp8 in blocks of {block[0]} x {block[1]}"
        return f"{words}, experts in fp4" if config.get("expert_dtype") == "fp4" else words


def _scale_name(module: Module, local: str) -> str:
    """The name of the scales of a tensor; if it has none, the name that they should have."""
    names = [local + suffix for suffix in _SUFFIXES]
    if local == "weight":
        names += _INSTEAD
    return next((name for name in names if name in module.tensors), names[0])


def _block(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    block = quantization.get("weight_block_size")
    if isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block):
        return block[0], block[1]
    return None


def _activations(
    quantization: Mapping[str, Any], block: tuple[int, int] | None
) -> QuantArgs | None:
    """How inputs are rounded: in groups with blocks, else by a scale for the tensor or a token."""
    if block is not None:
        return QuantArgs("e4m3", "group", block[1], dynamic=True)
    is_static = quantization.get("activation_scheme") == "static"
    return PRESETS["FP8" if is_static else "FP8_DYNAMIC"].activations
