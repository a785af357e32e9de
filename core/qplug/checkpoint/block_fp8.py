"""Checkpoints published in blocks of fp8 (DeepSeek-V3), read as float checkpoints.

``X.weight`` is float8, and ``X.weight_scale_inv`` has a float32 scale for each block of it. The
weight is their product, which is computed as the weight is read; nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qplug.api import StoredTensor, TensorSpec
from qplug.api.tensors import FLOAT_DTYPES
from qplug.checkpoint.tensor_file import tensor_bytes
from qplug.errors import QplugError

_SCALE = "_scale_inv"


@dataclass(frozen=True)
class BlockTensor(StoredTensor):
    """A weight ``[out, in]`` that is stored as fp8 ``codes`` and read in the dtype of ``spec``.

    ``scales``: ``[ceil(out / tall), ceil(in / wide)]`` for a ``block`` of ``(tall, wide)``.
    """

    spec: TensorSpec
    codes: StoredTensor
    scales: StoredTensor
    block: tuple[int, int]

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys((*self.codes.paths, *self.scales.paths)))

    @property
    def location(self) -> str:
        return f"{self.codes.location} {self.scales.location}"

    def read(self) -> Tensor:
        codes, scales = self.codes.read(), self.scales.read().float()
        (tall, wide), width = self.block, codes.shape[1]
        weight = torch.empty(codes.shape, dtype=getattr(torch, self.spec.dtype))
        for number, row in enumerate(scales):
            rows = slice(number * tall, (number + 1) * tall)
            weight[rows] = codes[rows].float() * row.repeat_interleave(wide)[:width]
        return weight

    def chunks(self) -> Iterator[bytes]:
        yield bytes(tensor_bytes(self.read()))


def is_block_fp8(config: Mapping[str, Any]) -> bool:
    """Whether ``config.json`` says that weights are in blocks of fp8."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "fp8":
        return False
    block = quantization.get("weight_block_size")
    return (
        isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    )


def as_float(
    config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """The configuration and the tensors of the float checkpoint that the fp8 one stands for.

    Raises QplugError if a weight has no scales, or scales of a wrong shape.
    """
    tall, wide = config["quantization_config"]["weight_block_size"]
    stated = config.get("dtype") or config.get("torch_dtype")
    dtype = str(stated) if stated in FLOAT_DTYPES else "bfloat16"
    floats: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(_SCALE) and name.removesuffix(_SCALE) in tensors:
            continue
        if not tensor.spec.dtype.startswith("float8"):
            floats[name] = tensor
            continue
        scales, shape = tensors.get(name + _SCALE), tensor.spec.shape
        if scales is None or len(shape) != 2:
            raise QplugError(f"{tensor.paths[0]}: {name} is fp8, and has no {name + _SCALE}")
        if scales.spec.dtype not in FLOAT_DTYPES:
            raise QplugError(
                f"{scales.paths[0]}: {name + _SCALE} is {scales.spec.dtype}, not float32"
            )
        if scales.spec.shape != (math.ceil(shape[0] / tall), math.ceil(shape[1] / wide)):
            raise QplugError(
                f"{scales.paths[0]}: {name + _SCALE} is {list(scales.spec.shape)}, which does not "
                f"fit blocks of {tall} x {wide} of {list(shape)}"
            )
        spec = TensorSpec(dtype, shape)
        floats[name] = BlockTensor(spec, tensor, scales, (tall, wide))
    return {key: value for key, value in config.items() if key != "quantization_config"}, floats
