"""Asymmetric int4 in AWQ's layout, version ``gemm``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from qplug import (
    PRESETS,
    Capability,
    Exporter,
    ModelView,
    Problem,
    QplugError,
    QuantizedWeight,
    Scheme,
    Target,
    TensorSpec,
    beyond_limits,
    loading_problems,
)
from qplug_awq_format.capabilities import CAPABILITIES
from qplug_compressed_tensors.fusing import fused_groups, with_merged_names
from qplug_compressed_tensors.packing import pack_words, unpack_words

if TYPE_CHECKING:
    from qplug import Checkpoint

#: Which of eight neighbouring outputs each nibble of a word holds, lowest bits first.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACES = tuple(ORDER.index(place) for place in range(8))


class AWQFormat(Exporter[Target]):
    """The AWQ format: int4 weights with zero points, outputs packed in AWQ's order.

    One scheme serves a whole folder.
    """

    name = "awq"
    Params = Target
    quant_method: ClassVar[str | None] = "awq"
    serve_command = "vllm serve {}"

    @classmethod
    def capabilities(cls) -> Sequence[Capability]:
        return CAPABILITIES

    def refuses(self, model: ModelView, schemes: Mapping[str, Scheme]) -> str | None:
        kinds = sorted({scheme.name for scheme in schemes.values()})
        if kinds != ["W4A16_ASYM"]:
            return f"the format holds int4 with zero points: use W4A16_ASYM, not {kinds[0]}"
        if len(set(schemes.values())) > 1:
            return "the format has one size of groups in a folder"
        for name in schemes:
            if name not in model.quantizable:
                return f"{name}: the format keeps heads and routers float"
        for group in fused_groups(model.linears):
            if len({name in schemes for name in group}) > 1:
                return f"engines fuse {', '.join(group[:3])}, so all or none are quantized"
        for entry in self._floats(model, schemes):
            hit = next((name for name in with_merged_names(schemes) if entry in name), None)
            if hit is not None:
                return f"{entry} is to stay float, but engines would take {hit} for it too"
        return beyond_limits(CAPABILITIES, model, schemes, self.params)

    def layout(self, shape: tuple[int, int], scheme: Scheme, dtype: str) -> dict[str, TensorSpec]:
        out, width = shape
        groups = scheme.weights.scale_shape(shape)[1]
        return {
            "qweight": TensorSpec("int32", (width, out // 8)),
            "qzeros": TensorSpec("int32", (groups, out // 8)),
            "scales": TensorSpec(scheme.weights.scale_dtype, (groups, out)),
        }

    def pack(self, weight: QuantizedWeight, scheme: Scheme, dtype: str) -> dict[str, Tensor]:
        assert weight.zero is not None
        return {
            "qweight": _pack(weight.codes.T),
            "qzeros": _pack(weight.zero.T),
            "scales": weight.scale.T.to(getattr(torch, weight.args.scale_dtype)).contiguous(),
        }

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        stored = tensors["scales"]
        args = replace(scheme.weights, scale_dtype=str(stored.dtype).removeprefix("torch."))
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
            "modules_to_not_convert": self._floats(model, schemes),
        }

    def _floats(self, model: ModelView, schemes: Mapping[str, Scheme]) -> list[str]:
        """What stays float, by whole names: engines take any module whose name holds one."""
        floats = [name for name in model.linears if name not in schemes]
        if model.head is not None and model.head not in model.linears:
            floats.append(model.head)
        return sorted(with_merged_names(floats))

    def stored(self, folder: Checkpoint) -> dict[str, tuple[int, int]]:
        return {
            tensor.removesuffix(".qweight"): (8 * held.spec.shape[1], held.spec.shape[0])
            for tensor, held in folder.tensors.items()
            if tensor.endswith(".qweight") and len(held.spec.shape) == 2
        }

    def schemes(self, config: Mapping[str, Any], model: ModelView) -> dict[str, Scheme]:
        bits, size, version = config.get("bits"), config.get("group_size"), config.get("version")
        if bits != 4 or not isinstance(size, int) or version != "gemm":
            raise QplugError(f"awq of {bits} bits in groups of {size}, {version}, is not read")
        if not config.get("zero_point", True):
            raise QplugError("awq without zero points: engines have no kernel")
        scheme = PRESETS["W4A16_ASYM"].with_group_size(size)
        floats = config.get("modules_to_not_convert") or ()
        return {
            name: scheme
            for name in model.linears
            if name != model.head and not any(entry in name for entry in floats)
        }

    def check(self, folder: Checkpoint, model: ModelView) -> Iterator[Problem]:
        config = folder.config.get("quantization_config")
        if config is None:
            yield Problem("format", "config.json", "has no quantization_config")
            return
        schemes, fused = self.schemes(config, model), fused_groups(model.linears)
        yield from loading_problems(folder, model, schemes, self, scales=["scales"], fused=fused)


def _pack(codes: Tensor) -> Tensor:
    """uint8 ``[rows, out]`` as int32 ``[rows, out / 8]``."""
    rows = codes.shape[0]
    ordered = codes.unflatten(1, (-1, 8))[..., list(ORDER)]
    return pack_words(ordered.reshape(rows, -1), 4)


def _unpack(words: Tensor) -> Tensor:
    """The inverse: int32 ``[rows, out / 8]`` as uint8 ``[rows, out]``."""
    ordered = unpack_words(words, 4, 8 * words.shape[1])
    codes: Tensor = ordered.unflatten(1, (-1, 8))[..., list(_PLACES)].flatten(1)
    return codes
