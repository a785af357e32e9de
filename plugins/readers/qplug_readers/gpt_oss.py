"""Experts in MXFP4 as gpt-oss publishes them: stacked, with rows of outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qplug import Reader, StoredTensor
from qplug_readers.modules import Module, computed, read_modules

if TYPE_CHECKING:
    from torch import Tensor

_BLOCKS, _SCALES = "_blocks", "_scales"
_BYTES = 16  # in a group of 32


class MXFP4Reader(Reader):
    """Reads MXFP4 of gpt-oss: ``X_blocks`` and ``X_scales`` for the experts ``X``.

    ``X_blocks`` is uint8 ``[experts, rows, groups, 16]``: two e2m1 in a byte, the first in the low
    bits. ``X_scales`` is uint8 ``[experts, rows, groups]``: exponents with a bias of 127. The
    float ``X`` is ``[experts, 32 * groups, rows]``: transposed, as the model multiplies with it.
    """

    name = "mxfp4"

    def reads(self, config: Mapping[str, Any]) -> bool:
        return self.quantization(config).get("quant_method") == "mxfp4"

    def as_float(
        self, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
    ) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        dtype = self.float_dtype(config)

        def floats_of(module: Module) -> dict[str, StoredTensor]:
            names = [local for local in module.tensors if local.endswith(_BLOCKS)]
            return {local.removesuffix(_BLOCKS): _experts(module, local, dtype) for local in names}

        return self.without_quantization(config), read_modules(tensors, floats_of, self.name)


def _experts(module: Module, local: str, dtype: str) -> StoredTensor:
    blocks = module.need(local, ("uint8",), of=local)
    shape = blocks.spec.shape
    if len(shape) != 4 or shape[3] != _BYTES:
        raise module.wrong(local, f"is {list(shape)}, not [experts, rows, groups, {_BYTES}]")
    scale = local.removesuffix(_BLOCKS) + _SCALES
    scales = module.need(scale, ("uint8", "float8_e8m0fnu"), shape[:3], of=local)
    experts, rows, groups = shape[:3]
    parts = {"blocks": blocks, "scales": scales}
    return computed((experts, 2 * _BYTES * groups, rows), dtype, parts, _transposed, parts)


def _transposed(values: Mapping[str, Tensor]) -> Tensor:
    """Returns experts ``[experts, in, out]`` in float32, of some or all experts."""
    import torch

    from qplug_compressed_tensors.fp4 import unpack_e2m1
    from qplug_readers.float8 import scale_values

    experts, rows, groups, size = values["blocks"].shape
    floats = torch.empty((experts, 2 * size * groups, rows))
    for expert, (blocks, scales) in enumerate(zip(values["blocks"], values["scales"], strict=True)):
        codes = unpack_e2m1(blocks.reshape(rows, groups * size)).float()
        weight = codes.view(rows, groups, -1) * scale_values(scales)[..., None]
        floats[expert] = weight.flatten(1).T
    return floats
