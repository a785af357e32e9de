"""The AWQ format: asymmetric int4 in the layout of version ``gemm``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from qplug import (
    PRESETS,
    ModelView,
    QplugError,
    QuantizedWeight,
    Scheme,
    TensorSpec,
)
from qplug_compressed_tensors.fusing import with_merged_names
from qplug_compressed_tensors.one_scheme import OneSchemeFormat
from qplug_compressed_tensors.outside import loose_ends, portable, renamed, tower_suffixes
from qplug_compressed_tensors.packing import pack_words, stored_args, unpack_words

if TYPE_CHECKING:
    from torch import Tensor

    from qplug import Checkpoint

#: The output, among eight neighbours, that each nibble of a word contains, lowest bits first.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACES = tuple(ORDER.index(place) for place in range(8))


class AWQ(OneSchemeFormat):
    """Stores int4 weights with zero points, outputs packed in AWQ's order."""

    quant_method: ClassVar[str | None] = "awq"
    presets = ("W4A16_ASYM",)
    stores = "int4 with zero points (use W4A16_ASYM)"

    def layout(self, shape: tuple[int, int], scheme: Scheme, dtype: str) -> dict[str, TensorSpec]:
        out, width = shape
        groups = scheme.weights.scale_shape(shape)[1]
        return {
            "qweight": TensorSpec("int32", (width, out // 8)),
            "qzeros": TensorSpec("int32", (groups, out // 8)),
            "scales": TensorSpec(scheme.weights.scale_dtype, (groups, out)),
        }

    def pack(self, weight: QuantizedWeight, scheme: Scheme, dtype: str) -> dict[str, Tensor]:
        import torch

        assert weight.zero is not None
        return {
            "qweight": _pack(weight.codes.T),
            "qzeros": _pack(weight.zero.T),
            "scales": weight.scale.T.to(getattr(torch, weight.args.scale_dtype)).contiguous(),
        }

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        stored = tensors["scales"]
        args = stored_args(scheme.weights, stored)
        codes, zero = _unpack(tensors["qweight"]), _unpack(tensors["qzeros"])
        return QuantizedWeight(
            codes.T.contiguous(), stored.T.float().contiguous(), zero.T.contiguous(), args
        )

    def config(self, model: ModelView, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
        (args,) = {scheme.weights for scheme in schemes.values()}
        return {
            "quant_method": "awq",
            "bits": args.bits,
            "group_size": args.group_size or -1,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": names_of_floats(model, schemes),
        }

    def stored_shapes(self, folder: Checkpoint) -> dict[str, tuple[int, int]]:
        return {
            tensor.removesuffix(".qweight"): (8 * stored.spec.shape[1], stored.spec.shape[0])
            for tensor, stored in folder.tensors.items()
            if tensor.endswith(".qweight") and len(stored.spec.shape) == 2
        }

    def read_schemes(self, config: Mapping[str, Any], model: ModelView) -> dict[str, Scheme]:
        bits, size, version = config.get("bits"), config.get("group_size"), config.get("version")
        if bits != 4 or not isinstance(size, int) or version != "gemm":
            raise QplugError(
                f"qplug reads awq of 4 bits in version gemm, not of {bits} bits in groups of "
                f"{size} in version {version}"
            )
        if not config.get("zero_point", True):
            raise QplugError("engines have no kernel for awq without zero points")
        scheme = PRESETS["W4A16_ASYM"].with_group_size(size)
        floats = config.get("modules_to_not_convert") or ()
        return {
            name: scheme
            for name in model.linears
            if name != model.head and not any(entry in name for entry in floats)
        }

    def quantizes_experts(self, config: Mapping[str, Any], name: str) -> bool:
        return not any(entry in name for entry in config.get("modules_to_not_convert") or ())


def names_of_floats(model: ModelView, schemes: Mapping[str, Scheme]) -> list[str]:
    """The names of modules that stay float, merged matrices and towers included, sorted.

    Engines load every module as float whose name contains one of these names. Names in composite
    models are without the modules that engines rename.
    """
    floats = [name for name in model.linears if name not in schemes]
    if model.head is not None and model.head not in model.linears:
        floats.append(model.head)
    names = {*with_merged_names(floats + renamed(model, floats)), *model.stacked_experts}
    ends = [f"{end}." for end in tower_suffixes(model, floats)] + loose_ends(model, floats)
    blocks = tuple(f"{block}." for block in model.blocks)
    return sorted({*(portable(n) if n.startswith(blocks) else n for n in names), *ends})


def _pack(codes: Tensor) -> Tensor:
    """Pack uint8 codes ``[rows, out]`` into int32 ``[rows, out / 8]``."""
    rows = codes.shape[0]
    ordered = codes.unflatten(1, (-1, 8))[..., list(ORDER)]
    return pack_words(ordered.reshape(rows, -1), 4)


def _unpack(words: Tensor) -> Tensor:
    """Unpack int32 ``[rows, out / 8]`` into uint8 codes ``[rows, out]``."""
    ordered = unpack_words(words, 4, 8 * words.shape[1])
    codes: Tensor = ordered.unflatten(1, (-1, 8))[..., list(_PLACES)].flatten(1)
    return codes
