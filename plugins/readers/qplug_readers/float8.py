"""Weights in fp8 with a scale for the tensor, a row, some columns of a row, or a block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from qplug import E8M0_SCALES, QplugError, QuantArgs, QuantizedWeight, StoredTensor
from qplug_compressed_tensors.configuration import named_scheme
from qplug_readers.modules import Module, coded, computed

if TYPE_CHECKING:
    from torch import Tensor

#: The dtypes of codes, and the name of the number format of each.
FLOAT8 = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}
#: The dtypes of scales. In bytes and in e8m0 they are powers of two.
FLOAT_SCALES, POWERS = ("float32", "bfloat16", "float16"), ("float8_e8m0fnu", "uint8")
SCALES = (*FLOAT_SCALES, *POWERS)


def scale_values(stored: Tensor) -> Tensor:
    """Returns stored scales as float32; bytes are exponents with a bias of 127."""
    import torch

    if stored.dtype == torch.uint8:
        stored = stored.view(torch.float8_e8m0fnu)
    return stored.float()


def float8_weight(
    module: Module,
    local: str,
    scale: str,
    dtype: str,
    *,
    block: tuple[int, int] | None = None,
    activations: QuantArgs | None = None,
    input_scale: StoredTensor | None = None,
) -> StoredTensor:
    """Returns the float tensor that ``local`` in fp8 and its scales, called ``scale``, stand for.

    ``dtype``: of the float tensor. ``block``: the rows and columns that share a scale, if the
    configuration says so; else the shapes tell. ``activations``: how inputs are rounded, with
    ``input_scale`` if that is stored. Raises QplugError if scales are missing or do not fit.
    """
    codes = module.tensors[local]
    module.used.add(local)
    shape = codes.spec.shape
    if not all(shape):
        raise module.wrong(local, f"is empty: {list(shape)}")
    if scale not in module.tensors:
        raise module.wrong(local, f"is fp8, and has no {module.full(scale)}")
    scales = module.need(scale, SCALES, of=local)
    parts: dict[str, StoredTensor] = {"codes": codes, "scales": scales}
    if len(shape) > 2:
        if not _fits_stack(shape, scales.spec.shape, block):
            raise _misfit(module, scale, shape, block)

        def make(values: Mapping[str, Tensor]) -> Tensor:
            return _stack(values["codes"], scale_values(values["scales"]), block, dtype)

        single = math.prod(scales.spec.shape) == 1
        return computed(shape, dtype, parts, make, ["codes"] if single else ["codes", "scales"])
    args = _args(codes, scales, block) if len(shape) == 2 else None
    if args is None:
        raise _misfit(module, scale, shape, block)
    out, width = shape
    if input_scale is not None and math.prod(input_scale.spec.shape) == 1:
        parts["input_scale"] = input_scale
    elif activations is not None and not activations.dynamic:
        activations = None  # there is no scale for inputs
    groups = args.scale_shape((out, width))[1]

    def unpack(values: Mapping[str, Tensor]) -> QuantizedWeight:
        stored = values.get("input_scale")
        return QuantizedWeight(
            values["codes"],
            scale_values(values["scales"]).reshape(-1, groups),
            None,
            args,
            None if stored is None else stored.float().reshape(1),
        )

    by_row = {"tensor": ["codes"], "block": []}.get(args.strategy, ["codes", "scales"])
    scheme = named_scheme(args, activations)
    if scales.spec.dtype in FLOAT_SCALES:
        scheme = scheme.with_scale_dtype(scales.spec.dtype)
    return coded((out, width), dtype, parts, scheme, unpack, by_row)


def _misfit(
    module: Module, scale: str, shape: tuple[int, ...], block: tuple[int, int] | None
) -> QplugError:
    blocks = f"blocks of {block[0]} x {block[1]} of " if block is not None else ""
    stored = list(module.tensors[scale].spec.shape)
    return module.wrong(scale, f"is {stored}, which does not fit {blocks}{list(shape)}")


def _args(
    codes: StoredTensor, scales: StoredTensor, block: tuple[int, int] | None
) -> QuantArgs | None:
    """The format of a matrix by its shapes; None if the scales do not fit it."""
    out, width = codes.spec.shape
    dtype, shape = FLOAT8[codes.spec.dtype], scales.spec.shape
    if math.prod(shape) == 1 and block is None:
        return QuantArgs(dtype, "tensor")
    if len(shape) == 4 and shape[1] == shape[3] == 1:  # ModelOpt keeps the axes of its blocks
        shape = (shape[0], shape[2])
    if block is not None:
        fits = shape == (-(-out // block[0]), -(-width // block[1]))
        return QuantArgs(dtype, "block", block=block) if fits else None
    if shape in ((out,), (out, 1)):
        return QuantArgs(dtype, "channel")
    if len(shape) != 2 or not all(shape) or width % shape[1] or out % shape[0]:
        return None
    if shape[0] == out:
        powers = scales.spec.dtype in POWERS
        args = QuantArgs(dtype, "group", width // shape[1])
        return replace(args, scale_dtype=E8M0_SCALES) if powers else args
    return QuantArgs(dtype, "block", block=(out // shape[0], width // shape[1]))


def _fits_stack(
    shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int] | None
) -> bool:
    """Whether ``scales`` fit matrices that are stacked, such as experts ``[experts, out, in]``."""
    if math.prod(scales) == 1 or scales == shape[:1]:
        return True
    if len(scales) != len(shape) or scales[:-2] != shape[:-2]:
        return False
    if block is not None:
        return scales[-2:] == (-(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    return all(scales[-2:]) and shape[-2] % scales[-2] == 0 and shape[-1] % scales[-1] == 0


def _stack(codes: Tensor, scales: Tensor, block: tuple[int, int] | None, dtype: str) -> Tensor:
    """Returns ``codes`` ``[experts, ..., out, in]`` times their scales, matrix by matrix."""
    import torch

    out, width = codes.shape[-2:]
    if scales.numel() == 1:
        scales = scales.reshape(1, 1, 1).expand(math.prod(codes.shape[:-2]), 1, 1)
    elif scales.ndim == 1:
        scales = scales.reshape(-1, 1, 1)
    scales = scales.reshape(-1, *scales.shape[-2:])
    tall, wide = block or (out // scales.shape[-2], width // scales.shape[-1])
    floats = torch.empty(codes.shape, dtype=getattr(torch, dtype))
    for matrix, stored, scale in zip(
        floats.view(-1, out, width), codes.reshape(-1, out, width), scales, strict=True
    ):
        spread = scale.repeat_interleave(tall, 0)[:out].repeat_interleave(wide, 1)[:, :width]
        matrix.copy_(stored.float() * spread)
    return floats
