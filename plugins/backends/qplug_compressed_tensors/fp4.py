"""Packs NVFP4 and MXFP4: two e2m1 codes in a byte, with e4m3 scales or powers of two.

NVFP4 also stores one float32 for the whole tensor: the inverse of the global scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qplug import QuantizedWeight, Scheme, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

#: The magnitudes of e2m1 in the order of their codes.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def pack_e2m1(codes: Tensor) -> Tensor:
    """Pack e2m1 values in e4m3 ``[out, in]`` into uint8 ``[out, in / 2]``, low bits first."""
    import torch

    table = torch.zeros(256, dtype=torch.uint8)
    table[_values().view(torch.uint8).long()] = torch.arange(16, dtype=torch.uint8)
    nibbles = table.to(codes.device)[codes.contiguous().view(torch.uint8).int()]
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Unpack uint8 ``[out, in / 2]`` into e2m1 values in e4m3 ``[out, in]``."""
    import torch

    values = _values().view(torch.uint8).to(packed.device)
    nibbles = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(1)
    return values[nibbles.int()].view(torch.float8_e4m3fn)


def _values() -> Tensor:
    import torch

    magnitudes = torch.tensor(_MAGNITUDES)
    return torch.cat([magnitudes, -magnitudes]).to(torch.float8_e4m3fn)


def local_scale(weight: QuantizedWeight) -> Tensor:
    """The scales of ``weight`` divided by its global scale, e4m3 ``[out, groups]``.

    Raises ValueError if ``weight`` has no global scale, or if e4m3 cannot store a quotient exactly.
    """
    import torch

    if weight.global_scale is None:
        raise ValueError("scales in e4m3 need a global scale")
    ratio = weight.scale / weight.global_scale
    local = ratio.to(torch.float8_e4m3fn)
    if not torch.equal(local.float(), ratio):
        raise ValueError("e4m3 cannot store the scales: they are no multiples of the global scale")
    return local


def layout(shape: tuple[int, int], scheme: Scheme) -> dict[str, TensorSpec]:
    """The specs of the stored tensors of a weight of ``shape`` (out, in), by local name."""
    out, width = shape
    args = scheme.weights
    packed = {"weight_packed": TensorSpec("uint8", (out, width // 2))}
    if not args.two_level:
        return {**packed, "weight_scale": TensorSpec("uint8", args.scale_shape(shape))}
    packed["weight_scale"] = TensorSpec(args.scale_dtype, args.scale_shape(shape))
    packed["weight_global_scale"] = TensorSpec("float32", (1,))
    if scheme.static_inputs:
        packed["input_global_scale"] = TensorSpec("float32", (1,))
    return packed


def pack(weight: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
    """The stored tensors of ``weight``, as ``layout`` describes them, by local name."""
    import torch

    packed = {"weight_packed": pack_e2m1(weight.codes)}
    if not weight.args.two_level:
        return {**packed, "weight_scale": weight.scale.to(torch.float8_e8m0fnu).view(torch.uint8)}
    packed["weight_scale"] = local_scale(weight)
    assert weight.global_scale is not None
    packed["weight_global_scale"] = 1 / weight.global_scale  # exact: it is a power of two
    if scheme.static_inputs:
        if weight.input_scale is None:
            raise ValueError(f"{scheme.name} needs an input_scale")
        packed["input_global_scale"] = 1 / weight.input_scale
    return packed


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """The weight in ``tensors``: the exact inverse of ``pack``."""
    import torch

    codes, stored = unpack_e2m1(tensors["weight_packed"]), tensors["weight_scale"]
    if not scheme.weights.two_level:
        scale = stored.view(torch.float8_e8m0fnu).float()
        return QuantizedWeight(codes, scale, None, scheme.weights)
    divisor = tensors["weight_global_scale"].float().reshape(1)
    return QuantizedWeight(
        codes,
        stored.float() / divisor,
        None,
        scheme.weights,
        input_scale(tensors),
        1 / divisor,
    )


def input_scale(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The global scale of inputs, float32 ``[1]``; None if ``tensors`` have none."""
    stored = tensors.get("input_global_scale")
    return None if stored is None else 1 / stored.float().reshape(1)


def unpacked_shape(packed: TensorSpec) -> tuple[int, int]:
    """The shape (out, in) of the weight that ``weight_packed`` with spec ``packed`` contains."""
    return packed.shape[0], 2 * packed.shape[1]
