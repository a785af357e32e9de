"""Weights in e2m1, two in a byte, with scales in e4m3 (NVFP4) or powers of two (MXFP4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qplug import PRESETS, QuantizedWeight, Scheme, StoredTensor
from qplug_compressed_tensors import fp4
from qplug_readers.float8 import POWERS, scale_values
from qplug_readers.modules import Module, coded

if TYPE_CHECKING:
    from torch import Tensor

MXFP4 = PRESETS["MXFP4A16"]


def mxfp4_weight(
    module: Module, local: str, scale: str, dtype: str, scheme: Scheme = MXFP4
) -> StoredTensor:
    """Returns the float weight of bytes ``[out, in / 2]`` with a power of two for 32 columns.

    ``local`` and ``scale`` are the names of both tensors. Raises QplugError if they do not fit.
    """
    codes = module.need(local, ("uint8", "int8"), of=local)
    if len(codes.spec.shape) != 2:
        raise module.wrong(local, f"is {list(codes.spec.shape)}, not a matrix of packed e2m1")
    out, width = codes.spec.shape[0], 2 * codes.spec.shape[1]
    size = scheme.weights.group_size
    if size is None or width % size:
        raise module.wrong(local, f"has {width} columns, which are no groups of {size}")
    scales = module.need(scale, POWERS, (out, width // size), of=local)

    def unpack(values: Mapping[str, Tensor]) -> QuantizedWeight:
        import torch

        values4 = fp4.unpack_e2m1(values["codes"].view(torch.uint8))
        return QuantizedWeight(values4, scale_values(values["scales"]), None, scheme.weights)

    parts = {"codes": codes, "scales": scales}
    return coded((out, width), dtype, parts, scheme, unpack, parts)
