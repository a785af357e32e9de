"""The GPTQ format: symmetric integers in the layout of AutoGPTQ and GPTQModel, version 1."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from qplug import (
    PRESETS,
    ModelView,
    Problem,
    QplugError,
    QuantizedWeight,
    Scheme,
    TensorSpec,
)
from qplug_compressed_tensors.configuration import expression, float_modules, patterns
from qplug_compressed_tensors.fusing import with_merged_names
from qplug_compressed_tensors.one_scheme import OneSchemeFormat
from qplug_compressed_tensors.packing import pack_words, stored_args, unpack_words

if TYPE_CHECKING:
    from torch import Tensor

    from qplug import Checkpoint

_BITS = {4: "W4A16", 8: "W8A16"}


class GPTQ(OneSchemeFormat):
    """Stores symmetric int4 or int8 weights; columns keep their order.

    All zero points are the middle code, and are stored as the middle code minus 1.
    """

    quant_method: ClassVar[str | None] = "gptq"
    presets = tuple(_BITS.values())
    stores = "symmetric integers (W4A16, W8A16; --backend awq stores W4A16_ASYM)"

    def layout(self, shape: tuple[int, int], scheme: Scheme, dtype: str) -> dict[str, TensorSpec]:
        out, width = shape
        args = scheme.weights
        words, groups = 32 // args.bits, args.scale_shape(shape)[1]
        return {
            "qweight": TensorSpec("int32", (-(-width // words), out)),
            "qzeros": TensorSpec("int32", (groups, -(-out // words))),
            "scales": TensorSpec(args.scale_dtype, (groups, out)),
            "g_idx": TensorSpec("int32", (width,)),
        }

    def pack(self, weight: QuantizedWeight, scheme: Scheme, dtype: str) -> dict[str, Tensor]:
        import torch

        args, middle = weight.args, 2 ** (weight.args.bits - 1)
        codes = weight.codes.view(torch.uint8) + middle  # the wrap of bytes is intended
        zeros = torch.full_like(weight.scale.T, middle - 1, dtype=torch.uint8)
        return {
            "qweight": pack_words(codes, args.bits).T.contiguous(),
            "qzeros": pack_words(zeros, args.bits),
            "scales": weight.scale.T.to(getattr(torch, args.scale_dtype)).contiguous(),
            "g_idx": group_of_columns(weight.codes.shape[1], scheme).to(codes.device),
        }

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        import torch

        stored = tensors["scales"]
        args = stored_args(scheme.weights, stored)
        words = tensors["qweight"].T
        codes = unpack_words(words, args.bits, len(tensors["g_idx"])) - 2 ** (args.bits - 1)
        return QuantizedWeight(codes.view(torch.int8), stored.T.float(), None, args)

    def config(self, model: ModelView, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
        (args,) = {scheme.weights for scheme in schemes.values()}
        floats = [n for n in model.linears if n not in schemes and n != model.head]
        merged = with_merged_names(floats)
        # Engines match the names of merged matrices; every block has its own.
        quantized = with_merged_names(schemes)
        entries = patterns(merged, [*quantized, *merged], model.blocks)
        entries += float_modules(model, schemes)
        return {
            "quant_method": "gptq",
            "bits": args.bits,
            "group_size": args.group_size or -1,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            "dynamic": {f"-:{_expression(entry, quantized)}": {} for entry in entries},
        }

    def stored_shapes(self, folder: Checkpoint) -> dict[str, tuple[int, int]]:
        shapes = {}
        for tensor, stored in folder.tensors.items():
            name, _, local = tensor.rpartition(".")
            columns = folder.tensors.get(f"{name}.g_idx")
            if local == "qweight" and columns is not None and len(stored.spec.shape) == 2:
                shapes[name] = (stored.spec.shape[1], columns.spec.shape[0])
        return shapes

    def read_schemes(self, config: Mapping[str, Any], model: ModelView) -> dict[str, Scheme]:
        bits, size = config.get("bits"), config.get("group_size")
        if bits not in _BITS or not isinstance(size, int):
            raise QplugError(
                f"qplug reads gptq of 4 or 8 bits, not of {bits} bits in groups of {size}"
            )
        if config.get("desc_act") or not config.get("sym", True):
            raise QplugError("engines refuse gptq that is asymmetric or has desc_act")
        scheme = PRESETS[_BITS[bits]].with_group_size(size)
        skipped = _skipped(config)
        return {
            name: scheme
            for name in model.linears
            if name != model.head and not any(re.match(entry, name) for entry in skipped)
        }

    def quantizes_experts(self, config: Mapping[str, Any], name: str) -> bool:
        return not any(re.match(entry, name) for entry in _skipped(config))

    def check_folder(self, folder: Checkpoint, model: ModelView) -> Iterator[Problem]:
        problems = list(super().check_folder(folder, model))
        yield from problems
        broken = {problem.where for problem in problems}
        config = folder.config.get("quantization_config")
        schemes = {} if config is None else self.read_schemes(config, model)
        for name, scheme in schemes.items():
            if name not in broken:
                yield from _number_problems(folder, name, model.linears[name], scheme)


def group_of_columns(width: int, scheme: Scheme) -> Tensor:
    """The number of the group of each of ``width`` columns (``g_idx``), int32 ``[width]``."""
    import torch

    size = scheme.weights.group_size or width
    return torch.arange(width, dtype=torch.int32) // size


def _skipped(config: Mapping[str, Any]) -> list[str]:
    """The expressions for names of modules that a ``quantization_config`` leaves float."""
    return [entry[2:] for entry in config.get("dynamic") or {} if entry.startswith("-:")]


def _expression(entry: str, quantized: Sequence[str]) -> str:
    return (entry if entry.startswith("re:") else expression(entry, quantized))[3:]


def _number_problems(
    folder: Checkpoint, name: str, shape: tuple[int, int], scheme: Scheme
) -> Iterator[Problem]:
    """Yield a problem if columns are reordered, or if zero points are not the middle code."""
    import torch

    if not torch.equal(folder.read(f"{name}.g_idx"), group_of_columns(shape[1], scheme)):
        yield Problem("g_idx", name, "its columns are reordered (desc_act): engines refuse that")
    bits = scheme.weights.bits
    zeros = unpack_words(folder.read(f"{name}.qzeros"), bits, shape[0])
    if not (zeros == 2 ** (bits - 1) - 1).all():
        yield Problem("zero", name, "qzeros is not the middle code minus 1: kernels ignore qzeros")
