"""The engine SGLang: its kernels, the rules of its loader, and its server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qplug import Format, ModelView, Problem, QuantArgs, Scheme, Server, Target
from qplug_compressed_tensors.configuration import format_of
from qplug_compressed_tensors.engine import CompressedTensorsLoader, half_precision
from qplug_compressed_tensors.rules import Case, no_cache_scales, one_format
from qplug_compressed_tensors.silent import (
    int8_experts_have_no_kernel,
    merged_matrices_are_named,
)
from qplug_sglang.capabilities import RELEASES
from qplug_sglang.modelopt import NVFP4, ModelOptNVFP4, loader_problems

if TYPE_CHECKING:
    from qplug import Checkpoint


def nvfp4_is_stored_as_modelopt_does(case: Case) -> Iterator[Problem]:
    """No linear of a compressed-tensors folder has NVFP4: SGLang runs that only on few GPUs."""
    for name, scheme in case.schemes.items():
        if scheme == NVFP4:
            yield Problem("format", name, "SGLang loads NVFP4 only in ModelOpt's format")


class SGLang(CompressedTensorsLoader):
    """SGLang, which loads compressed-tensors folders and ModelOpt's NVFP4."""

    releases = RELEASES
    serve_command = "python -m sglang.launch_server --model-path {}"
    server = Server(
        "sglang",
        "sglang.launch_server",
        "--model-path",
        ("--disable-cuda-graph", "--disable-radix-cache"),
        "--tp-size",
        "--context-length",
    )
    ignores_substrings = True
    rules = (
        *CompressedTensorsLoader.rules,
        one_format,
        no_cache_scales,
        int8_experts_have_no_kernel,
        merged_matrices_are_named,
        nvfp4_is_stored_as_modelopt_does,
    )

    def refuses(
        self, model: ModelView, schemes: Mapping[str, Scheme], target: Target
    ) -> str | None:
        outside = next((name for name in schemes if name not in model.quantizable), None)
        if outside is not None:
            return (
                f"{outside}: SGLang serves garbage for a quantized head or router; "
                f"add --ignore {outside}"
            )
        formats = sorted({layout for s in schemes.values() if (layout := format_of(s))})
        if len(formats) > 1:
            return f"SGLang reads one format in a folder, not {' and '.join(formats)}"
        for name, scheme in schemes.items():
            if ".experts." in name and scheme.activations and scheme.activations.dtype == "int8":
                return f"{name}: SGLang runs no experts in {scheme.name}; try FP8_DYNAMIC or W4A16"
        return super().refuses(model, schemes, target)

    def refuses_cache(self, cache: QuantArgs) -> str | None:
        return (
            "SGLang drops the scales of a KV cache in silence; leave the option out, and serve "
            "with --kv-cache-dtype fp8_e4m3, which uses scales of 1"
        )

    def check_folder(
        self, folder: Checkpoint, model: ModelView, format: Format
    ) -> Iterator[Problem]:
        yield from super().check_folder(folder, model, format)
        config = folder.config.get("quantization_config") or {}
        if config.get("quant_method") == ModelOptNVFP4.quant_method:
            yield from loader_problems(folder, model, format.read_schemes(config, model))

    def serve_arguments(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Marlin for NVFP4, as other kernels need newer GPUs; bfloat16 for a float32 model."""
        quantization = config.get("quantization_config") or {}
        nvfp4 = quantization.get("quant_algo") == "NVFP4"
        return (*half_precision(config), *(("--fp4-gemm-backend", "marlin") if nvfp4 else ()))
