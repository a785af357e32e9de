"""The compressed-tensors format: its tensors, and their description in config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from qplug import Format, ModelView, Problem, QuantArgs, QuantizedWeight, Scheme, TensorSpec
from qplug_compressed_tensors import byte_codes, fp4, mxfp8
from qplug_compressed_tensors.configuration import (
    MXFP8_QUANTIZED,
    NAIVE_QUANTIZED,
    PACK_QUANTIZED,
    Configuration,
    args_to_json,
    cache_of,
    format_of,
    quantizes_experts,
    write_config,
)
from qplug_compressed_tensors.loader import Plain
from qplug_compressed_tensors.packing import pack_words, stored_args, unpack_words, word_count
from qplug_compressed_tensors.rules import FORMAT_RULES, Case

if TYPE_CHECKING:
    from torch import Tensor

    from qplug import Checkpoint


@dataclass(frozen=True)
class CompressedTensors(Format):
    """Stores codes as the library compressed-tensors does.

    ``plain``: how plain entries of ``ignore`` match names when the configuration is read.
    """

    plain: Plain = "whole"

    quant_method: ClassVar[str | None] = "compressed-tensors"

    def refuses(self, model: ModelView, schemes: Mapping[str, Scheme]) -> str | None:
        for scheme in schemes.values():
            if format_of(scheme) is None:
                return f"the format has no layout for {scheme.name} ({scheme.weights.dtype})"
        return None

    def scale_dtype(self, scheme: Scheme, model_dtype: str) -> str:
        # Kernels multiply with the scales of packed integers in the model's dtype, whatever the
        # inputs are, and so does Marlin with those of fp8 whose inputs are float.
        is_own = format_of(scheme) in (PACK_QUANTIZED, NAIVE_QUANTIZED)
        return model_dtype if is_own else super().scale_dtype(scheme, model_dtype)

    def layout(self, shape: tuple[int, int], scheme: Scheme, dtype: str) -> dict[str, TensorSpec]:
        out, width = shape
        args = scheme.weights
        if format_of(scheme) == MXFP8_QUANTIZED:
            return mxfp8.layout(shape, scheme)
        if args.fixes_scales:
            return fp4.layout(shape, scheme)
        if format_of(scheme) != PACK_QUANTIZED:
            return byte_codes.layout(shape, scheme)
        scales = args.scale_shape(shape)
        packed = {
            "weight_packed": TensorSpec("int32", (out, word_count(width, args.bits))),
            "weight_scale": TensorSpec(args.scale_dtype, scales),
            "weight_shape": TensorSpec("int64", (2,)),
        }
        if not args.symmetric:
            rows = word_count(out, args.bits)
            packed["weight_zero_point"] = TensorSpec("int32", (rows, scales[1]))
        return packed

    def pack(self, weight: QuantizedWeight, scheme: Scheme, dtype: str) -> dict[str, Tensor]:
        import torch

        args, codes = weight.args, weight.codes
        if format_of(scheme) == MXFP8_QUANTIZED:
            return mxfp8.pack(weight, scheme)
        if args.fixes_scales:
            return fp4.pack(weight, scheme)
        scale = weight.scale.to(getattr(torch, args.scale_dtype))
        if args.strategy == "tensor":
            scale = scale.reshape(1)
        if format_of(scheme) != PACK_QUANTIZED:
            packed = {"weight": codes, "weight_scale": scale}
            if scheme.static_inputs:
                if weight.input_scale is None:
                    raise ValueError(f"{scheme.name} needs an input_scale")
                packed["input_scale"] = weight.input_scale
            return packed
        if args.symmetric:  # words contain codes counted from 0; the wrap of bytes is intended
            codes = codes.view(torch.uint8) + 2 ** (args.bits - 1)
        packed = {
            "weight_packed": pack_words(codes, args.bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(weight.codes.shape),
        }
        if weight.zero is not None:
            packed["weight_zero_point"] = pack_words(weight.zero.T, args.bits).T.contiguous()
        return packed

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        import torch

        if format_of(scheme) == MXFP8_QUANTIZED:
            return mxfp8.unpack(tensors, scheme)
        if scheme.weights.fixes_scales:
            return fp4.unpack(tensors, scheme)
        # llm-compressor stores in bytes what qplug packs. Each format has a name of its own for
        # codes, so the name says which it is: rules check that config.json says the same.
        if "weight" in tensors or format_of(scheme) != PACK_QUANTIZED:
            return byte_codes.unpack(tensors, scheme, self.input_scale(tensors, scheme))
        stored = tensors["weight_scale"]
        args = stored_args(scheme.weights, stored)
        scale = stored.float()
        out, width = tensors["weight_shape"].tolist()
        codes = unpack_words(tensors["weight_packed"], args.bits, width)
        if args.symmetric:
            codes = (codes - 2 ** (args.bits - 1)).view(torch.int8)
            return QuantizedWeight(codes, scale, None, args)
        zero = unpack_words(tensors["weight_zero_point"].T, args.bits, out).T.contiguous()
        return QuantizedWeight(codes, scale, zero, args)

    def input_scale(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor | None:
        if scheme.weights.two_level:
            return fp4.input_scale(tensors)
        return super().input_scale(tensors, scheme)

    def config(self, model: ModelView, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
        return write_config(model, schemes)

    def refuses_cache(self, cache: QuantArgs) -> str | None:
        return None

    def with_cache(self, config: dict[str, Any] | None, cache: QuantArgs) -> dict[str, Any] | None:
        return None if config is None else {**config, "kv_cache_scheme": args_to_json(cache)}

    def read_cache(self, config: Mapping[str, Any]) -> QuantArgs | None:
        return cache_of(config)

    def stored_shapes(self, folder: Checkpoint) -> dict[str, tuple[int, int]]:
        shapes = {}
        for tensor, stored in folder.tensors.items():
            name, _, local = tensor.rpartition(".")
            # A weight_shape of the wrong form is skipped here: a rule reports it.
            if local == "weight_shape" and stored.spec == TensorSpec("int64", (2,)):
                out, width = folder.read(tensor).tolist()
                shapes[name] = (out, width)
            elif local == "weight_packed" and stored.spec.dtype == "uint8":
                shapes[name] = fp4.unpacked_shape(stored.spec)
        return shapes

    def read_schemes(self, config: Mapping[str, Any], model: ModelView) -> dict[str, Scheme]:
        parsed = Configuration.parse(config, plain=self.plain, embedding=model.embedding)
        groups = {name: parsed.group(name) for name in model.linears}
        return {name: group.scheme for name, group in groups.items() if group is not None}

    def quantizes_experts(self, config: Mapping[str, Any], name: str) -> bool:
        parsed = Configuration.parse(config, plain=self.plain)
        return quantizes_experts(parsed, name)

    def check_folder(self, folder: Checkpoint, model: ModelView) -> Iterator[Problem]:
        config = folder.config.get("quantization_config")
        if config is None:
            yield Problem("format", "config.json", "has no quantization_config")
            return
        parsed = Configuration.parse(config, plain=self.plain, embedding=model.embedding)
        case = Case(folder, model, parsed, self)
        for rule in FORMAT_RULES:
            yield from rule(case)
