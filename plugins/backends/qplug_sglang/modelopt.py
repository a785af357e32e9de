"""The format of NVIDIA's ModelOpt for NVFP4, which SGLang was run with on GPUs without fp4.

FP8 may stand beside NVFP4 (see ``mixed``): ModelOpt and compressed-tensors store it alike.

SGLang 0.5.23 loads NVFP4 in compressed-tensors too, but no version was run with that, and older
versions refuse it below sm100.

It differs from compressed-tensors in names and in one convention: ``weight_scale_2`` and
``input_scale`` are factors, but ``weight_global_scale`` and ``input_global_scale`` are divisors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar

from qplug import (
    Format,
    ModelView,
    Problem,
    QplugError,
    QuantArgs,
    QuantizedWeight,
    Scheme,
    TensorSpec,
)
from qplug_compressed_tensors import fp4
from qplug_compressed_tensors.format import CompressedTensors
from qplug_compressed_tensors.fusing import merged_matrices, with_merged_names
from qplug_compressed_tensors.outside import loose_ends, renamed, tower_suffixes
from qplug_sglang import mixed
from qplug_sglang.mixed import FP8, MIXED, NVFP4

if TYPE_CHECKING:
    from torch import Tensor

    from qplug import Checkpoint

#: The only KV cache that the format describes: e4m3, with one scale of keys and one of values.
FP8_CACHE = QuantArgs("e4m3", "tensor")
#: Where the tensors of FP8 are the same.
_COMPRESSED = CompressedTensors()


class ModelOpt(Format):
    """Stores NVFP4, or NVFP4 and FP8, in ModelOpt's tensors."""

    quant_method: ClassVar[str | None] = "modelopt"
    scales = ("weight_scale", "weight_scale_2", "input_scale")

    def refuses(self, model: ModelView, schemes: Mapping[str, Scheme]) -> str | None:
        return mixed.refuses_mixture(model, schemes)

    def layout(self, shape: tuple[int, int], scheme: Scheme, dtype: str) -> dict[str, TensorSpec]:
        if scheme == FP8:
            return _COMPRESSED.layout(shape, scheme, dtype)
        args = scheme.weights
        return {
            "weight": TensorSpec("uint8", (shape[0], shape[1] // 2)),
            "weight_scale": TensorSpec(args.scale_dtype, args.scale_shape(shape)),
            "weight_scale_2": TensorSpec("float32", ()),
            "input_scale": TensorSpec("float32", ()),
        }

    def pack(self, weight: QuantizedWeight, scheme: Scheme, dtype: str) -> dict[str, Tensor]:
        if scheme == FP8:
            return _COMPRESSED.pack(weight, scheme, dtype)
        local = fp4.local_scale(weight)
        if weight.input_scale is None or weight.global_scale is None:
            raise ValueError("NVFP4 needs an input_scale")
        return {
            "weight": fp4.pack_e2m1(weight.codes),
            "weight_scale": local,
            "weight_scale_2": weight.global_scale.reshape(()),
            "input_scale": weight.input_scale.reshape(()),
        }

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        if scheme == FP8:
            return _COMPRESSED.unpack(tensors, scheme)
        unit = tensors["weight_scale_2"].float().reshape(1)
        return QuantizedWeight(
            fp4.unpack_e2m1(tensors["weight"]),
            tensors["weight_scale"].float() * unit,
            None,
            scheme.weights,
            self.input_scale(tensors, scheme),
            unit,
        )

    def config(self, model: ModelView, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
        """The ``quantization_config`` of a folder with NVFP4, or with NVFP4 and FP8.

        It names every float module, and every matrix that float modules are merged into. SGLang
        reads ``ignore`` in config.json, but ``exclude_modules`` in ModelOpt's own file.
        """
        floats = [name for name in model.linears if name not in schemes]
        if model.head is not None and model.head not in model.linears:
            floats.append(model.head)
        ends = [f"*{end}.*" for end in tower_suffixes(model, floats)]
        ends += [f"*.{end}" for end in loose_ends(model, floats)]
        named = with_merged_names(floats + renamed(model, floats))
        ignore = sorted((*named, *model.stacked_experts, *ends))
        layers = mixed.quantized_layers(schemes) if FP8 in schemes.values() else None
        return {
            "quant_method": self.quant_method,
            "quant_algo": "NVFP4" if layers is None else MIXED,
            "kv_cache_quant_algo": None,
            "group_size": NVFP4.weights.group_size,
            "ignore": ignore,
            "exclude_modules": ignore,
            **({} if layers is None else {"quantized_layers": layers}),
            "producer": {"name": "modelopt", "version": "0.33"},
        }

    def refuses_cache(self, cache: QuantArgs) -> str | None:
        return None if cache == FP8_CACHE else super().refuses_cache(cache)

    def with_cache(self, config: dict[str, Any] | None, cache: QuantArgs) -> dict[str, Any] | None:
        return None if config is None else {**config, "kv_cache_quant_algo": "FP8"}

    def read_cache(self, config: Mapping[str, Any]) -> QuantArgs | None:
        return FP8_CACHE if config.get("kv_cache_quant_algo") == "FP8" else None

    def read_schemes(self, config: Mapping[str, Any], model: ModelView) -> dict[str, Scheme]:
        ignored = frozenset(config.get("ignore") or ())
        if config.get("quant_algo") == MIXED:
            layers = mixed.layers_of(config)
            named = [name for name in model.linears if name in layers]
            return {name: layers[name] for name in named if not _matches(ignored, name)}
        if config.get("quant_algo") != "NVFP4" or config.get("group_size") != 16:
            raise QplugError(
                f"qplug reads modelopt's NVFP4 in groups of 16, not quant_algo "
                f"{config.get('quant_algo')!r} in groups of {config.get('group_size')}"
            )
        return {name: NVFP4 for name in model.linears if not _matches(ignored, name)}

    def quantizes_experts(self, config: Mapping[str, Any], name: str) -> bool:
        if config.get("quant_algo") == MIXED:
            inside = f"{name}."
            if not any(each == name or each.startswith(inside) for each in mixed.layers_of(config)):
                return False
        return not _matches(frozenset(config.get("ignore") or ()), name)

    def stored_shapes(self, folder: Checkpoint) -> dict[str, tuple[int, int]]:
        return {
            tensor.removesuffix(".weight"): fp4.unpacked_shape(stored.spec)
            for tensor, stored in folder.tensors.items()
            if tensor.endswith(".weight") and stored.spec.dtype == "uint8"
        }


def _matches(entries: frozenset[str], name: str) -> bool:
    """Whether one of ``entries``, names in which a star stands for any text, is ``name``."""
    return name in entries or any("*" in entry and fnmatchcase(name, entry) for entry in entries)


def loader_problems(
    folder: Checkpoint, model: ModelView, schemes: Mapping[str, Scheme]
) -> Iterator[Problem]:
    """Yield a problem for each rule of SGLang's loader for ModelOpt that ``folder`` breaks.

    ``schemes`` has the scheme of each quantized linear by name.
    """
    for name in schemes:
        if name not in model.quantizable:
            yield Problem("head", name, "is a head or a router, and must stay float")
    if folder.config["quantization_config"].get("quant_algo") == MIXED:
        yield from mixed.mixture_problems(folder, model, schemes)
    # SGLang keeps the largest weight_scale_2 of merged linears, but does not adapt their scales.
    for group in merged_matrices(schemes):
        tensors = [f"{name}.weight_scale_2" for name in group]
        if all(tensor in folder.tensors for tensor in tensors):
            values = {folder.read(tensor).item() for tensor in tensors}
            if len(values) > 1:
                yield Problem("fused", ", ".join(group), "have more than one weight_scale_2")
