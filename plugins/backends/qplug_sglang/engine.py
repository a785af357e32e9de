"""The engine SGLang: its kernels, the rules of its loader, and its server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qplug import Format, ModelView, Problem, Scheme, Server, Target, kernel_problems
from qplug_compressed_tensors.engine import CompressedTensorsLoader, half_precision
from qplug_compressed_tensors.fusing import fused_problems, with_partners
from qplug_compressed_tensors.rules import cache_problems
from qplug_compressed_tensors.silent import merged_matrices_are_named
from qplug_sglang.capabilities import IN_MODELOPT, RELEASES
from qplug_sglang.int4_fp8 import int4_fp8_is_of_experts, unserved
from qplug_sglang.loaders import FP4_BY_OPTION, LOADERS
from qplug_sglang.members import WRITTEN
from qplug_sglang.mixed import MIXED, refuses_mixture
from qplug_sglang.modelopt import ModelOpt, loader_problems, told_by
from qplug_sglang.shared_experts import (
    divided_shared_expert,
    shared_expert_problems,
    shared_experts_are_as_routed_ones,
)
from qplug_sglang.unpacked import (
    latent_projections_are_unpacked,
    packed_in_vain,
    packed_problems,
)

if TYPE_CHECKING:
    from qplug import Checkpoint


class SGLang(CompressedTensorsLoader):
    """SGLang, which loads compressed-tensors folders and ModelOpt's, with NVFP4 and FP8."""

    releases = RELEASES
    loaders = LOADERS
    serve_command = "python -m sglang.launch_server --model-path {}"
    server = Server(
        "sglang",
        "sglang.launch_server",
        "--model-path",
        ("--disable-cuda-graph", "--disable-radix-cache"),
        "--tp-size",
        "--context-length",
    )
    rules = (
        *CompressedTensorsLoader.rules,
        merged_matrices_are_named,
        int4_fp8_is_of_experts,
        latent_projections_are_unpacked,
        shared_experts_are_as_routed_ones,
    )

    def refuses(
        self, model: ModelView, schemes: Mapping[str, Scheme], target: Target
    ) -> str | None:
        if self._is_modelopt(schemes):
            sentence = refuses_mixture(model, schemes, WRITTEN[self.release])
            if sentence is not None:
                return sentence
        sentence = super().refuses(model, schemes, target)
        unloaded = unserved(schemes) or divided_shared_expert(model, schemes)
        return ": ".join(unloaded) if sentence is None and unloaded is not None else sentence

    def too_narrow(
        self, model: ModelView, schemes: Mapping[str, Scheme], target: Target
    ) -> dict[str, str]:
        unpacked = with_partners(packed_in_vain(model, schemes), schemes)
        return unpacked | super().too_narrow(model, schemes, target)

    def _is_modelopt(self, schemes: Mapping[str, Scheme]) -> bool:
        """Whether a folder with ``schemes`` is written in ModelOpt's format."""
        return not WRITTEN[self.release].isdisjoint(schemes.values())

    def _refuses_mixture(self, schemes: Mapping[str, Scheme]) -> str | None:
        """The rules of compressed-tensors hold where the folder has that format."""
        return None if self._is_modelopt(schemes) else super()._refuses_mixture(schemes)

    def check_folder(
        self, folder: Checkpoint, model: ModelView, format: Format
    ) -> Iterator[Problem]:
        config = folder.config.get("quantization_config") or {}
        if config.get("quant_method") != ModelOpt.quant_method:
            yield from super().check_folder(folder, model, format)
            return
        schemes = format.read_schemes(config, model)
        rows = [row for row in self.capabilities() if row.scheme not in IN_MODELOPT]
        yield from kernel_problems(model, schemes, [*rows, *IN_MODELOPT.values()])
        yield from fused_problems(model.linears, schemes)
        yield from packed_problems(model, schemes)
        yield from shared_expert_problems(model, schemes)
        yield from loader_problems(folder, model, schemes, self.release)
        yield from cache_problems(folder, model, format.read_cache(config))

    def serve_arguments(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """The kernel for NVFP4, where the version does not choose it; bfloat16 for float32."""
        quantization = config.get("quantization_config") or {}
        nvfp4 = (
            told_by(quantization).get("quant_algo") in ("NVFP4", MIXED)
            and self.release in FP4_BY_OPTION
        )
        return (*half_precision(config), *(("--fp4-gemm-backend", "marlin") if nvfp4 else ()))
