"""Checkpoints of NVIDIA's ModelOpt: fp8, NVFP4, MXFP8, and mixtures of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from qplug import PRESETS, QuantArgs, QuantizedWeight, Reader, Scheme, StoredTensor
from qplug_readers.modules import Module, coded, read_modules

if TYPE_CHECKING:
    from torch import Tensor

_FLOATS = ("float16", "bfloat16", "float32")
#: What ModelOpt calls fp4 weights whose inputs are float.
_FLOAT_INPUTS = "W4A16_NVFP4"


class ModelOptReader(Reader):
    """Reads ModelOpt: fp8 with scales for tensors, rows or blocks, NVFP4, and MXFP8.

    What each module stores says how it is read. NVFP4 is uint8 ``X.weight`` ``[out, in / 2]`` with
    ``X.weight_scale`` in e4m3 ``[out, in / 16]``, which ``X.weight_scale_2`` multiplies. Scales of
    blocks and of MXFP8 are ``X.weight_scale`` or, as SGLang has them, ``X.weight_scale_inv``.
    """

    name = "modelopt"

    def reads(self, config: Mapping[str, Any]) -> bool:
        return str(self.quantization(config).get("quant_method")).startswith("modelopt")

    def as_float(
        self, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
    ) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        quantization, dtype = self.quantization(config), self.float_dtype(config)

        def floats_of(module: Module) -> dict[str, StoredTensor]:
            weight = _weight(module, dtype, _algorithm(quantization, module.name))
            return {} if weight is None else {"weight": weight}

        return self.without_quantization(config), read_modules(tensors, floats_of, self.name)

    def describe(self, config: Mapping[str, Any]) -> str:
        return f"modelopt {self.quantization(config).get('quant_algo', '')}".strip()


def _algorithm(quantization: Mapping[str, Any], name: str) -> str:
    """The ``quant_algo`` of the module ``name``, in upper case; empty if there is none."""
    inner = quantization.get("quantization")
    told = inner if isinstance(inner, dict) else quantization
    layers = told.get("quantized_layers")
    entry = layers.get(name) if isinstance(layers, dict) else told
    return str(entry.get("quant_algo") or "").upper() if isinstance(entry, Mapping) else ""


def _inputs(scales: StoredTensor | None, *, stored: bool) -> QuantArgs | None:
    """How the inputs of an fp8 weight are rounded; ``stored``: under a scale that is stored."""
    from qplug_readers.float8 import POWERS

    name = "FP8" if stored else "FP8_DYNAMIC"
    if scales is not None and not stored:
        sides = [side for side in scales.spec.shape if side != 1]
        name = "MXFP8" if scales.spec.dtype in POWERS else "FP8_BLOCK" if len(sides) > 1 else name
    return PRESETS[name].activations


def _weight(module: Module, dtype: str, algorithm: str) -> StoredTensor | None:
    """Returns the float weight of a module; None if the module has no codes.

    ``algorithm``: the ``quant_algo`` that config.json has for it.
    """
    from qplug_readers.float8 import FLOAT8, float8_weight

    weight = module.tensors.get("weight")
    if weight is None or weight.spec.dtype not in ("uint8", *FLOAT8):
        return None
    if "pre_quant_scale" in module.tensors:
        raise module.wrong("pre_quant_scale", "scales inputs, which qplug cannot undo")
    inputs = module.find("input_scale")
    if weight.spec.dtype in FLOAT8:
        inverse = "weight_scale_inv"
        scale = inverse if inverse in module.tensors else "weight_scale"
        rounded = _inputs(module.tensors.get(scale), stored=inputs is not None)
        return float8_weight(
            module, "weight", scale, dtype, activations=rounded, input_scale=inputs
        )
    shape = weight.spec.shape
    if "weight_scale_2" not in module.tensors or len(shape) != 2 or shape[1] % 8:
        raise module.wrong(
            "weight", f"is uint8 {list(shape)}, but no NVFP4 matrix with a weight_scale_2"
        )
    out, width = shape[0], 2 * shape[1]
    parts = {
        "weight": module.need("weight", ("uint8",), of="weight"),
        "weight_scale": module.need(
            "weight_scale", ("float8_e4m3fn",), (out, width // 16), of="weight"
        ),
        "weight_scale_2": module.need("weight_scale_2", _FLOATS, (), (1,), of="weight"),
    }
    rounds = inputs is not None and algorithm != _FLOAT_INPUTS  # older folders store a scale there
    if inputs is not None and rounds:
        parts["input_scale"] = inputs
    scheme = PRESETS["NVFP4" if rounds else "NVFP4A16"]
    unpack = partial(_unpack, scheme)
    return coded((out, width), dtype, parts, scheme, unpack, ("weight", "weight_scale"))


def _unpack(scheme: Scheme, values: Mapping[str, Tensor]) -> QuantizedWeight:
    from qplug_sglang.modelopt import ModelOpt

    return ModelOpt().unpack(values, scheme)
