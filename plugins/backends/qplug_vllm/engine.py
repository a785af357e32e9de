"""What vLLM loads, and with which kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qplug import Capability, ModelView, Scheme
from qplug.limits import Target
from qplug_compressed_tensors.configuration import INT_QUANTIZED, PACK_QUANTIZED, format_of
from qplug_compressed_tensors.exporter import CompressedTensors
from qplug_compressed_tensors.rules import RULES, head_and_embedding_are_float
from qplug_vllm.capabilities import CAPABILITIES
from qplug_vllm.head import head_is_a_target


class VLLM(CompressedTensors):
    """Folders that vLLM serves."""

    name = "vllm"
    Params = Target
    quant_method = None
    serve_command = "vllm serve {}"
    rules = tuple(
        head_is_a_target if rule is head_and_embedding_are_float else rule for rule in RULES
    )

    @classmethod
    def capabilities(cls) -> Sequence[Capability]:
        return CAPABILITIES

    def refuses(self, model: ModelView, schemes: Mapping[str, Scheme]) -> str | None:
        for name, scheme in schemes.items():
            if name in model.quantizable:
                continue
            if name != model.head:
                return f"{name}: vLLM keeps routers float"
            if format_of(scheme) not in (PACK_QUANTIZED, INT_QUANTIZED):
                return f"{name}: vLLM takes a head in W4A16, W8A16 or W8A8, not {scheme.name}"
        return super().refuses(model, schemes)
