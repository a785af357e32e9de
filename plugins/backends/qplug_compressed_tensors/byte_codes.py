"""Codes that fill a byte each, whatever their bits are: formats of other writers.

llm-compressor stores integers so wherever inputs are quantized too (``int-quantized``), and all
weights that no other format of compressed-tensors has a place for (``naive-quantized``). qplug
packs integers of fewer than 8 bits into words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qplug import QplugError, QuantizedWeight, Scheme, TensorSpec
from qplug_compressed_tensors.packing import stored_args

if TYPE_CHECKING:
    from torch import Tensor


def layout(shape: tuple[int, int], scheme: Scheme) -> dict[str, TensorSpec]:
    """The tensors of a weight ``shape`` (out, in) in integers or fp8, by local name.

    Zero points are int8 and have the shape of scales.
    """
    args = scheme.weights
    scales = (1,) if args.strategy == "tensor" else args.scale_shape(shape)
    specs = {
        "weight": TensorSpec("float8_e4m3fn" if args.is_float else "int8", shape),
        "weight_scale": TensorSpec(args.scale_dtype, scales),
    }
    if not args.symmetric:
        specs["weight_zero_point"] = TensorSpec("int8", scales)
    if scheme.static_inputs:
        specs["input_scale"] = TensorSpec("float32", (1,))
    return specs


def unpack(
    tensors: Mapping[str, Tensor], scheme: Scheme, input_scale: Tensor | None
) -> QuantizedWeight:
    """The codes ``[out, in]`` and scales of ``tensors``, which ``layout`` describes.

    ``input_scale``: of static inputs, float32 ``[1]``. Raises QplugError if an integer does not fit
    into the bits that the scheme has.
    """
    codes, scale = tensors["weight"], tensors["weight_scale"]
    args = stored_args(scheme.weights, scale)
    scale = scale.float()
    scale = scale.reshape(1, 1) if args.strategy == "tensor" else scale
    if args.is_float:
        return QuantizedWeight(codes, scale, None, args, input_scale)
    codes = _checked(codes, "weight", args.bits)
    if args.symmetric:
        return QuantizedWeight(codes, scale, None, args, input_scale)
    zero = _checked(tensors["weight_zero_point"], "weight_zero_point", args.bits)
    middle = 2 ** (args.bits - 1)
    codes, zero = (_from_zero(stored, middle) for stored in (codes, zero))
    return QuantizedWeight(codes, scale, zero.reshape(scale.shape), args, input_scale)


def _checked(stored: Tensor, local: str, bits: int) -> Tensor:
    """Returns ``stored``, int8. Raises QplugError if an integer has more than ``bits`` bits."""
    if bits == 8:
        return stored
    low, high = (int(value) for value in stored.aminmax())
    if low < -(2 ** (bits - 1)) or high >= 2 ** (bits - 1):
        raise QplugError(f"{local} has integers from {low} to {high}, which are not int{bits}")
    return stored


def _from_zero(stored: Tensor, middle: int) -> Tensor:
    """Signed integers, int8, as uint8 that count from 0; the wrap of bytes is intended."""
    import torch

    return stored.view(torch.uint8) + middle
