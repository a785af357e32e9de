"""Checkpoints in the GPTQ format, as AutoGPTQ, GPTQModel and AutoRound write them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from qplug import QplugError, QuantArgs, QuantizedWeight, Reader, StoredTensor
from qplug_compressed_tensors.configuration import named_scheme
from qplug_readers.modules import Module, coded, read_modules

if TYPE_CHECKING:
    from torch import Tensor

_BITS = (4, 8)
_FLOATS = ("float16", "bfloat16", "float32")


class GPTQReader(Reader):
    """Reads GPTQ of 4 or 8 bits: symmetric or not, of both versions, with any order of columns.

    ``X.qweight`` is int32 ``[in * bits / 32, out]``, ``X.qzeros`` ``[groups, out * bits / 32]``,
    ``X.scales`` ``[groups, out]``; ``X.g_idx`` has the group of each column. Version 1, ``gptq``,
    stores zero points minus 1, ``gptq_v2`` stores them as they are.
    """

    name = "gptq"

    def reads(self, config: Mapping[str, Any]) -> bool:
        quantization = self.quantization(config)
        method = quantization.get("quant_method")
        packing = str(quantization.get("packing_format"))
        return method == "gptq" or (method == "auto-round" and "gptq" in packing)

    def as_float(
        self, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
    ) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        quantization, dtype = self.quantization(config), self.float_dtype(config)

        def floats_of(module: Module) -> dict[str, StoredTensor]:
            if "qweight" not in module.tensors:
                return {}
            return {"weight": _weight(module, quantization, dtype)}

        return self.without_quantization(config), read_modules(tensors, floats_of, self.name)

    def describe(self, config: Mapping[str, Any]) -> str:
        quantization = self.quantization(config)
        return f"gptq of {quantization.get('bits')} bits in groups of {_size(quantization)}"


def _size(quantization: Mapping[str, Any]) -> int | None:
    size = quantization.get("group_size")
    return size if type(size) is int and size > 0 else None


def _weight(module: Module, quantization: Mapping[str, Any], dtype: str) -> StoredTensor:
    words = module.need("qweight", ("int32",), of="qweight")
    if len(words.spec.shape) != 2:
        raise module.wrong("qweight", f"is {list(words.spec.shape)}, not a matrix")
    rows, out = words.spec.shape
    scales = module.need("scales", _FLOATS, of="qweight")
    order = module.find("g_idx")
    bits = quantization.get("bits")
    if order is not None and len(order.spec.shape) == 1 and rows:
        bits = max(1, 32 * rows // max(1, order.spec.shape[0]))  # a module may have its own
    if bits not in _BITS:
        raise module.wrong("qweight", f"has codes of {bits} bits; qplug reads gptq of 4 or 8 bits")
    width = rows * 32 // bits
    if order is not None and order.spec.shape != (width,):
        raise module.wrong("g_idx", f"is {list(order.spec.shape)}, which does not fit qweight")
    if len(scales.spec.shape) != 2 or scales.spec.shape[1] != out or not scales.spec.shape[0]:
        raise module.wrong("scales", f"is {list(scales.spec.shape)}, which does not fit qweight")
    groups = scales.spec.shape[0]
    zeros = module.need("qzeros", ("int32",), (groups, -(-out * bits // 32)), of="qweight")
    size = _size(quantization)
    if groups == 1:
        size = None
    elif size is None or -(-width // size) != groups:
        size = -(-width // groups)
    if groups > 1 and (size is None or width % size or width // size != groups):
        raise module.wrong("scales", f"has {groups} groups, which do not fit {width} columns")
    args = QuantArgs(
        f"int{bits}",
        "channel" if size is None else "group",
        size,
        symmetric=bool(quantization.get("sym", True)),
    )
    parts = {"qweight": words, "qzeros": zeros, "scales": scales}
    if order is not None:
        parts["g_idx"] = order
    is_v2 = quantization.get("checkpoint_format") == "gptq_v2"
    stored = _Stored(module.full("qweight"), args, is_v2)
    scheme = named_scheme(args, None).with_scale_dtype(scales.spec.dtype)
    tensor = coded((out, width), dtype, parts, scheme, stored.unpack)
    return replace(tensor, make=partial(stored.dequantize))


class _Stored:
    """How the tensors of one weight, called ``name``, are read."""

    def __init__(self, name: str, args: QuantArgs, is_v2: bool) -> None:
        self._name, self._args, self._is_v2 = name, args, is_v2

    def unpack(self, values: Mapping[str, Tensor]) -> QuantizedWeight:
        """The codes of columns that are in their own order."""
        import torch

        args = replace(self._args, scale_dtype=str(values["scales"].dtype).removeprefix("torch."))
        codes, zero, scale = self._unpacked(values)
        order = values.get("g_idx")
        groups = torch.arange(codes.shape[1]) // (args.group_size or codes.shape[1])
        if order is not None and not torch.equal(order.long(), groups):
            raise QplugError(
                f"{self._name}: its columns are reordered (desc_act), which no other format "
                "stores; quantize the folder again with qplug quantize"
            )
        if not args.symmetric:
            return QuantizedWeight(codes, scale, zero, args)
        middle = 2 ** (args.bits - 1)
        if not (zero == middle).all():
            raise QplugError(
                f"{self._name}: has zero points, but config.json says that codes are symmetric"
            )
        return QuantizedWeight((codes - middle).view(torch.int8), scale, None, args)

    def dequantize(self, values: Mapping[str, Tensor]) -> Tensor:
        """The float32 weight ``[out, in]``, of columns in any order."""
        import torch

        codes, zero, scale = self._unpacked(values)
        order = values.get("g_idx")
        if order is None:
            order = torch.arange(codes.shape[1]) // (self._args.group_size or codes.shape[1])
        order = order.long()
        if order.min() < 0 or order.max() >= scale.shape[1]:
            raise QplugError(f"{self._name}: its g_idx names a group that it does not have")
        weight = codes.float()
        weight -= zero[:, order]
        weight *= scale[:, order]
        return weight

    def _unpacked(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Codes ``[out, in]`` and zero points ``[out, groups]``, uint8, and float32 scales."""
        from qplug_compressed_tensors.packing import unpack_words

        bits = self._args.bits
        scale = values["scales"].T.float().contiguous()
        words = values["qweight"].T
        codes = unpack_words(words, bits, words.shape[1] * 32 // bits).contiguous()
        zero = unpack_words(values["qzeros"], bits, scale.shape[0]).T.contiguous()
        return codes, zero if self._is_v2 else (zero + 1) & (2**bits - 1), scale
