"""What SGLang loads, and with which kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qplug import (
    Capability,
    ModelView,
    Problem,
    QuantArgs,
    QuantizedWeight,
    Scheme,
    Server,
    Target,
    TensorSpec,
)
from qplug_compressed_tensors.configuration import format_of
from qplug_compressed_tensors.exporter import CompressedTensors, half_precision
from qplug_compressed_tensors.rules import no_cache_scales, one_format
from qplug_compressed_tensors.silent import (
    int8_experts_have_no_kernel,
    merged_matrices_are_named,
)
from qplug_sglang import modelopt
from qplug_sglang.capabilities import CAPABILITIES

if TYPE_CHECKING:
    from torch import Tensor

    from qplug import Checkpoint


class SGLang(CompressedTensors):
    """Folders that SGLang serves, and vLLM too. NVFP4 is stored as ModelOpt does."""

    name = "sglang"
    Params = Target
    quant_method = None
    serve_command = "python -m sglang.launch_server --model-path {}"
    server = Server(
        "sglang",
        "sglang.launch_server",
        "--model-path",
        ("--disable-cuda-graph", "--disable-radix-cache"),
    )
    ignores_substrings = True
    rules = (
        *CompressedTensors.rules,
        one_format,
        no_cache_scales,
        int8_experts_have_no_kernel,
        merged_matrices_are_named,
    )

    @classmethod
    def capabilities(cls) -> Sequence[Capability]:
        return CAPABILITIES

    def refuses(self, model: ModelView, schemes: Mapping[str, Scheme]) -> str | None:
        outside = next((name for name in schemes if name not in model.quantizable), None)
        if outside is not None:
            return f"{outside}: SGLang loads a quantized head or router, and serves garbage"
        formats = sorted({found for s in schemes.values() if (found := format_of(s))})
        if len(formats) > 1:
            return f"SGLang reads one format in a folder, not {' and '.join(formats)}"
        for name, scheme in schemes.items():
            if ".experts." in name and scheme.activations and scheme.activations.dtype == "int8":
                return f"{name}: SGLang runs no experts in {scheme.name}; try FP8_DYNAMIC or W4A16"
        return super().refuses(model, schemes)

    def refuses_cache(self, cache: QuantArgs) -> str | None:
        return (
            "SGLang drops the scales of a KV cache in silence; leave the option out, and serve "
            "with --kv-cache-dtype fp8_e4m3, which works with scales of 1"
        )

    def layout(self, shape: tuple[int, int], scheme: Scheme, dtype: str) -> dict[str, TensorSpec]:
        if scheme == modelopt.NVFP4:
            return modelopt.layout(shape, scheme)
        return super().layout(shape, scheme, dtype)

    def pack(self, weight: QuantizedWeight, scheme: Scheme, dtype: str) -> dict[str, Tensor]:
        if scheme == modelopt.NVFP4:
            return modelopt.pack(weight)
        return super().pack(weight, scheme, dtype)

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        if "weight_scale_2" in tensors:
            return modelopt.unpack(tensors, scheme)
        return super().unpack(tensors, scheme)

    def config(self, model: ModelView, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
        if modelopt.NVFP4 in schemes.values():
            return modelopt.config(model, schemes)
        return super().config(model, schemes)

    def cache(self, config: Mapping[str, Any]) -> QuantArgs | None:
        return None if config.get("quant_method") == modelopt.METHOD else super().cache(config)

    def stored(self, folder: Checkpoint) -> dict[str, tuple[int, int]]:
        if folder.config.get("quantization_config", {}).get("quant_method") != modelopt.METHOD:
            return super().stored(folder)
        return modelopt.stored(folder)

    def schemes(self, config: Mapping[str, Any], model: ModelView) -> dict[str, Scheme]:
        if config.get("quant_method") == modelopt.METHOD:
            return modelopt.schemes(config, model)
        return super().schemes(config, model)

    def check(self, folder: Checkpoint, model: ModelView) -> Iterator[Problem]:
        config = folder.config.get("quantization_config") or {}
        if config.get("quant_method") == modelopt.METHOD:
            yield from modelopt.check(folder, model, self)
        else:
            yield from super().check(folder, model)

    def serve_arguments(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Marlin for NVFP4, which runs where others do not; no float32, which few kernels take."""
        quantization = config.get("quantization_config") or {}
        nvfp4 = quantization.get("quant_algo") == "NVFP4"
        return (*half_precision(config), *(("--fp4-gemm-backend", "marlin") if nvfp4 else ()))
