"""Checkpoints in the compressed-tensors format, as llm-compressor and others write them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from qplug import (
    PRESETS,
    QplugError,
    QuantArgs,
    QuantizedWeight,
    Reader,
    Scheme,
    StoredTensor,
)
from qplug_compressed_tensors.configuration import Configuration, Group, named_scheme
from qplug_compressed_tensors.packing import word_count
from qplug_readers.modules import Module, coded, computed, read_modules

if TYPE_CHECKING:
    from torch import Tensor

_FLOATS = ("float16", "bfloat16", "float32")
_BITS = range(2, 9)
_PACKED, _SCALE, _ZERO = "weight_packed", "weight_scale", "weight_zero_point"


class CompressedTensorsReader(Reader):
    """Reads compressed-tensors: integers of 2 to 8 bits, fp8, NVFP4, MXFP4 and MXFP8.

    What each module stores says how it is read; config.json says how its inputs are rounded.
    """

    name = "compressed-tensors"

    def reads(self, config: Mapping[str, Any]) -> bool:
        quantization = self.quantization(config)
        method = quantization.get("quant_method")
        return method == "compressed-tensors" and bool(quantization.get("config_groups"))

    def as_float(
        self, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
    ) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        quantization, dtype = self.quantization(config), self.float_dtype(config)
        for part in ("transform_config", "sparsity_config"):
            if quantization.get(part) not in (None, {}) and _is_in_use(quantization[part]):
                raise QplugError(f"qplug reads no compressed-tensors with a {part}")
        parsed = Configuration.parse(quantization)

        def floats_of(module: Module) -> dict[str, StoredTensor]:
            group = parsed.group(module.name)
            if group is None and len(parsed.groups) == 1:
                group = parsed.groups[0]  # targets may name the module as it is called in memory
            weight = _weight(module, group, dtype)
            return {} if weight is None else {"weight": weight}

        return self.without_quantization(config), read_modules(tensors, floats_of, self.name)

    def describe(self, config: Mapping[str, Any]) -> str:
        return f"compressed-tensors, {self.quantization(config).get('format')}"


def _is_in_use(part: Any) -> bool:
    if not isinstance(part, Mapping):
        return True
    return bool(part.get("config_groups")) or part.get("format", "dense") != "dense"


def _weight(module: Module, group: Group | None, dtype: str) -> StoredTensor | None:
    """Returns the float weight of a module; None if the module has no codes."""
    from qplug_readers.float8 import FLOAT8, float8_weight

    inputs = None if group is None else group.scheme.activations
    if group is not None and group.scheme.weights.symmetric:
        module.used.add(_ZERO)  # older releases store zero points that mean nothing
    if _PACKED in module.tensors:
        if module.tensors[_PACKED].spec.dtype == "uint8":
            return _fp4(module, inputs, dtype)
        return _integers(module, group, inputs, dtype)
    weight = module.tensors.get("weight")
    if weight is not None and weight.spec.dtype in FLOAT8:
        stored = module.find("input_scale")
        block = None if group is None else group.scheme.weights.block
        return float8_weight(
            module, "weight", _SCALE, dtype, block=block, activations=inputs, input_scale=stored
        )
    if weight is not None and weight.spec.dtype == "int8":
        return _int8(module, weight, group, inputs, dtype)
    return None


def _group_args(
    module: Module, bits: int, shape: tuple[int, int], scales: StoredTensor, *, symmetric: bool
) -> QuantArgs:
    """The format of integers of ``shape`` (out, in) by the shape of their scales."""
    (out, width), stored = shape, scales.spec.shape
    if len(stored) != 2 or stored[0] != out or not stored[1] or width % stored[1]:
        raise module.wrong(_SCALE, f"is {list(stored)}, which does not fit {list(shape)}")
    if stored[1] == 1:
        return QuantArgs(f"int{bits}", "channel", symmetric=symmetric)
    return QuantArgs(f"int{bits}", "group", width // stored[1], symmetric=symmetric)


def _integers(
    module: Module, group: Group | None, inputs: QuantArgs | None, dtype: str
) -> StoredTensor:
    """Integers in words. A narrow weight may fill as many words in several widths of codes.

    Then the configuration decides, else the fewest bits.
    """
    words = module.need(_PACKED, ("int32",), of=_PACKED)
    stated = module.need("weight_shape", ("int64", "int32"), (2,), of=_PACKED)
    scales = module.need(_SCALE, _FLOATS, of=_PACKED)
    out, width = (int(side) for side in stated.read())
    told = None if group is None or group.scheme.weights.is_float else group.scheme.weights.bits
    fitting = [bits for bits in _BITS if words.spec.shape == (out, word_count(width, bits))]
    if min(out, width) < 1 or not fitting:
        raise module.wrong(
            _PACKED,
            f"is {list(words.spec.shape)}, which does not fit a weight of {[out, width]} "
            "in 2 to 8 bits",
        )
    bits = told if told in fitting else fitting[0]
    symmetric = _ZERO not in module.tensors or _ZERO in module.used
    args = _group_args(module, bits, (out, width), scales, symmetric=symmetric)
    parts = {_PACKED: words, _SCALE: scales, "weight_shape": stated}
    if not symmetric:
        groups = args.scale_shape((out, width))[1]
        shape = (word_count(out, bits), groups)
        parts[_ZERO] = module.need(_ZERO, ("int32",), shape, of=_PACKED)
    scheme = named_scheme(args, inputs).with_scale_dtype(scales.spec.dtype)
    order = module.find("weight_g_idx")
    if order is not None:
        parts["weight_g_idx"] = order
        if order.spec.shape != (width,):
            raise module.wrong("weight_g_idx", f"is {list(order.spec.shape)}, not [{width}]")
        return computed((out, width), dtype, parts, partial(_reordered, scheme))
    by_row = (_PACKED, _SCALE) if symmetric else ()
    unpack = partial(_unpack, scheme)
    return coded((out, width), dtype, parts, scheme, unpack, by_row)


def _unpack(scheme: Scheme, values: Mapping[str, Tensor]) -> QuantizedWeight:
    from qplug_compressed_tensors.format import CompressedTensors

    return CompressedTensors().unpack(values, scheme)


def _reordered(scheme: Scheme, values: Mapping[str, Tensor]) -> Tensor:
    """The float32 weight of columns whose groups ``weight_g_idx`` names (actorder)."""
    weight, order = _unpack(scheme, values), values["weight_g_idx"].long()
    if order.min() < 0 or order.max() >= weight.scale.shape[1]:
        raise QplugError("weight_g_idx names a group that the weight does not have")
    floats = weight.codes.float()
    if weight.zero is not None:
        floats -= weight.zero[:, order]
    floats *= weight.scale[:, order]
    return floats


def _fp4(module: Module, inputs: QuantArgs | None, dtype: str) -> StoredTensor:
    from qplug_readers.float4 import MXFP4, mxfp4_weight

    if "weight_global_scale" not in module.tensors:
        return mxfp4_weight(module, _PACKED, _SCALE, dtype, named_scheme(MXFP4.weights, inputs))
    words = module.need(_PACKED, ("uint8",), of=_PACKED)
    shape = words.spec.shape
    if len(shape) != 2 or shape[1] % 8:
        raise module.wrong(_PACKED, f"is {list(shape)}, not groups of 16 columns, two in a byte")
    out, width = shape[0], 2 * shape[1]
    nvfp4 = PRESETS["NVFP4A16"].weights
    parts = {
        _PACKED: words,
        _SCALE: module.need(_SCALE, ("float8_e4m3fn",), (out, width // 16), of=_PACKED),
        "weight_global_scale": module.need("weight_global_scale", _FLOATS, (1,), (), of=_PACKED),
    }
    stored = module.find("input_global_scale")
    if stored is not None:
        parts["input_global_scale"] = stored
    elif inputs is not None:
        inputs = None  # there is no scale for inputs
    scheme = named_scheme(nvfp4, inputs)
    return coded((out, width), dtype, parts, scheme, partial(_unpack, scheme), (_PACKED, _SCALE))


def _int8(
    module: Module,
    weight: StoredTensor,
    group: Group | None,
    inputs: QuantArgs | None,
    dtype: str,
) -> StoredTensor:
    """A weight in int8, which is not packed: the configuration says how many bits count."""
    if len(weight.spec.shape) != 2:
        raise module.wrong("weight", f"is int8 {list(weight.spec.shape)}, not a matrix")
    if not all(weight.spec.shape):
        raise module.wrong("weight", f"is empty: {list(weight.spec.shape)}")
    module.used.add("weight")
    out, width = weight.spec.shape
    scales = module.need(_SCALE, _FLOATS, of="weight")
    bits = 8 if group is None or group.scheme.weights.is_float else group.scheme.weights.bits
    symmetric = _ZERO not in module.tensors or _ZERO in module.used
    if scales.spec.shape in ((), (1,)):
        args = QuantArgs(f"int{bits}", "tensor", symmetric=symmetric)
    else:
        args = _group_args(module, bits, (out, width), scales, symmetric=symmetric)
    parts = {"weight": weight, _SCALE: scales}
    if not symmetric:
        parts[_ZERO] = module.need(_ZERO, ("int8",), scales.spec.shape, of="weight")
    stored = module.find("input_scale")
    if stored is not None:
        parts["input_scale"] = stored
    elif inputs is not None and not inputs.dynamic:
        inputs = None  # there is no scale for inputs
    scheme = named_scheme(args, inputs).with_scale_dtype(scales.spec.dtype)
    return coded((out, width), dtype, parts, scheme, partial(_unpack, scheme))
