"""The vllm backend writes compressed-tensors folders for vLLM's loader and kernels."""

from __future__ import annotations

from qplug import Exporter, ModelView, QuantArgs, Target
from qplug_compressed_tensors.format import CompressedTensors
from qplug_vllm.engine import VLLM

#: Where FlashAttention takes a scale for each head of an fp8 cache: version 3, which is for sm90
#: (``FlashAttentionBackend.supports_per_head_quant_scales`` of 0.33; sm100 is not known to).
_BY_HEAD = ("any", "sm90")


class VLLMExporter(Exporter[Target]):
    """Writes folders that vLLM serves."""

    name = "vllm"
    Params = Target
    format = CompressedTensors()
    engine = VLLM()

    def refuses_cache(self, cache: QuantArgs, model: ModelView) -> str | None:
        device = self.target.column.device
        if cache.strategy == "attn_head" and device not in _BY_HEAD:
            return (
                f"scales of heads need FlashAttention 3, which is for sm90, not {device}: use fp8"
            )
        return super().refuses_cache(cache, model)
