"""The format of NVIDIA's ModelOpt for NVFP4, which SGLang was run with on GPUs without fp4.

Others may stand beside NVFP4 (see ``mixed`` and ``members``). FP8 by tensor and by row is stored as
in compressed-tensors. Scales of blocks and of MXFP8 are ``weight_scale_inv``, as SGLang looks for
them; those that vLLM looks for, ``weight_scale`` with two axes or four, are read too.

SGLang 0.5.23 loads NVFP4 in compressed-tensors too, but no version was run with that, and older
versions refuse it below sm100.

It differs from compressed-tensors in names and in one convention: ``weight_scale_2`` and
``input_scale`` are factors, but ``weight_global_scale`` and ``input_global_scale`` are divisors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

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
from qplug_sglang import members, mixed
from qplug_sglang.members import FP8_BLOCK, FP8_DYNAMIC, MXFP8, NVFP4
from qplug_sglang.mixed import FOUR_BITS, MIXED

if TYPE_CHECKING:
    from torch import Tensor

    from qplug import Checkpoint

_T = TypeVar("_T")

#: The only KV cache that the format describes: e4m3, with one scale of keys and one of values.
FP8_CACHE = QuantArgs("e4m3", "tensor")
#: Where the tensors of fp8 are the same, but for a name.
_COMPRESSED = CompressedTensors()
#: The schemes whose scales have that name, and what compressed-tensors calls them.
_INVERSE, _RENAMED, _SCALE = (FP8_BLOCK, MXFP8), "weight_scale_inv", "weight_scale"


class ModelOpt(Format):
    """Stores NVFP4, with inputs rounded or not, and fp8 beside it, in ModelOpt's tensors."""

    quant_method: ClassVar[str | None] = "modelopt"
    scales = (_SCALE, _RENAMED, "weight_scale_2", "input_scale")

    def refuses(self, model: ModelView, schemes: Mapping[str, Scheme]) -> str | None:
        return mixed.refuses_mixture(model, schemes, FOUR_BITS)

    def layout(self, shape: tuple[int, int], scheme: Scheme, dtype: str) -> dict[str, TensorSpec]:
        if scheme not in FOUR_BITS:
            specs = _COMPRESSED.layout(shape, scheme, dtype)
            return _named(specs, _SCALE, _RENAMED) if scheme in _INVERSE else specs
        args = scheme.weights
        specs = {
            "weight": TensorSpec("uint8", (shape[0], shape[1] // 2)),
            _SCALE: TensorSpec(args.scale_dtype, args.scale_shape(shape)),
            "weight_scale_2": TensorSpec("float32", ()),
        }
        return specs | ({"input_scale": TensorSpec("float32", ())} if scheme == NVFP4 else {})

    def pack(self, weight: QuantizedWeight, scheme: Scheme, dtype: str) -> dict[str, Tensor]:
        if scheme not in FOUR_BITS:
            packed = _COMPRESSED.pack(weight, scheme, dtype)
            return _named(packed, _SCALE, _RENAMED) if scheme in _INVERSE else packed
        local = fp4.local_scale(weight)
        if weight.global_scale is None:
            raise ValueError(f"{scheme.name} needs a global_scale")
        packed = {
            "weight": fp4.pack_e2m1(weight.codes),
            _SCALE: local,
            "weight_scale_2": weight.global_scale.reshape(()),
        }
        if scheme == NVFP4:
            if weight.input_scale is None:
                raise ValueError("NVFP4 needs an input_scale")
            packed["input_scale"] = weight.input_scale.reshape(())
        return packed

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        if scheme not in FOUR_BITS:
            named = _named(tensors, _RENAMED, _SCALE)
            if scheme == FP8_BLOCK and named[_SCALE].ndim == 4:  # ModelOpt keeps the axes of blocks
                named[_SCALE] = named[_SCALE].flatten(2).flatten(0, 1)
            elif scheme == FP8_DYNAMIC:
                named[_SCALE] = named[_SCALE].reshape(-1, 1)
            return _COMPRESSED.unpack(named, scheme)
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
        """The ``quantization_config`` of a folder with NVFP4, or with an entry for each linear.

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
        layers = mixed.quantized_layers(schemes) if mixed.is_mixed(schemes) else None
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
        told = told_by(config)
        scheme = told.get("kv_cache_scheme")
        if isinstance(scheme, dict):  # what ModelOpt writes into config.json
            is_fp8 = scheme.get("type") == "float" and scheme.get("num_bits") == 8
        else:
            is_fp8 = told.get("kv_cache_quant_algo") == "FP8"
        return FP8_CACHE if is_fp8 else None

    def read_schemes(self, config: Mapping[str, Any], model: ModelView) -> dict[str, Scheme]:
        config = told_by(config)
        ignored = _ignored(config)
        if config.get("quant_algo") == MIXED:
            layers = mixed.layers_of(config)
            named = [name for name in model.linears if name in layers]
            return {name: layers[name] for name in named if not _matches(ignored, name)}
        algorithm, size = config.get("quant_algo"), _group_size(config)
        scheme = mixed.scheme_of(algorithm, size)
        if scheme is None or (scheme in FOUR_BITS and size is None):
            raise QplugError(
                f"qplug reads {', '.join(members.ALGORITHMS)} of modelopt, fp4 in groups of 16, "
                f"not quant_algo {algorithm!r} in groups of {size}"
            )
        return {name: scheme for name in model.linears if not _matches(ignored, name)}

    def quantizes_experts(self, config: Mapping[str, Any], name: str) -> bool:
        config = told_by(config)
        if config.get("quant_algo") == MIXED:
            inside = f"{name}."
            if not any(each == name or each.startswith(inside) for each in mixed.layers_of(config)):
                return False
        return not _matches(_ignored(config), name)

    def stored_shapes(self, folder: Checkpoint) -> dict[str, tuple[int, int]]:
        return {
            tensor.removesuffix(".weight"): fp4.unpacked_shape(stored.spec)
            for tensor, stored in folder.tensors.items()
            if tensor.endswith(".weight") and stored.spec.dtype == "uint8"
        }


def told_by(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a ``quantization_config``, which are one level below in ModelOpt's own file."""
    inner = config.get("quantization")
    return inner if isinstance(inner, dict) else config


def _ignored(told: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(told.get("ignore", told.get("exclude_modules")) or ())


def _group_size(told: Mapping[str, Any]) -> Any:
    """The size of groups, which newer folders have in ``config_groups`` alone; None if nowhere."""
    if told.get("group_size") is not None:
        return told["group_size"]
    groups = told.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        return weights.get("group_size") if isinstance(weights, dict) else None
    return None


def _named(tensors: Mapping[str, _T], old: str, new: str) -> dict[str, _T]:
    """Returns ``tensors`` with the one called ``old``, if there is one, called ``new``."""
    return {new if name == old else name: tensor for name, tensor in tensors.items()}


def _matches(entries: frozenset[str], name: str) -> bool:
    """Whether one of ``entries``, names in which a star stands for any text, is ``name``."""
    return name in entries or any("*" in entry and fnmatchcase(name, entry) for entry in entries)


def loader_problems(
    folder: Checkpoint, model: ModelView, schemes: Mapping[str, Scheme], release: str
) -> Iterator[Problem]:
    """Yield a problem for each rule of SGLang's loader for ModelOpt that ``folder`` breaks.

    ``schemes`` has the scheme of each quantized linear by name. ``release``: a key of
    ``members.LOADED``.
    """
    is_mixed = told_by(folder.config["quantization_config"]).get("quant_algo") == MIXED
    loaded = (members.LOADED if is_mixed else members.ALONE)[release]
    renamed_by = {*(folder.config.get("architectures") or ())} & members.RENAMES_SCALES
    for name, scheme in schemes.items():
        if name not in model.quantizable:
            yield Problem("head", name, "is a head or a router, and must stay float")
        if scheme not in loaded:
            what = "takes its codes for weights" if is_mixed else "does not load it"
            yield Problem("format", name, f"{release} has no {scheme.name} in such folders: {what}")
        elif scheme in _INVERSE and renamed_by:
            what = f"{release} looks for the {_RENAMED} of {min(renamed_by)} by another name"
            yield Problem("format", name, what)
    if is_mixed:
        yield from mixed.mixture_problems(folder, model, schemes)
    # SGLang keeps the largest weight_scale_2 of merged linears, but does not adapt their scales.
    for group in merged_matrices(schemes):
        tensors = [f"{name}.weight_scale_2" for name in group]
        if all(tensor in folder.tensors for tensor in tensors):
            values = {folder.read(tensor).item() for tensor in tensors}
            if len(values) > 1:
                yield Problem("fused", ", ".join(group), "have more than one weight_scale_2")
