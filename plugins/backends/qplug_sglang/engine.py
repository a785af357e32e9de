"""What SGLang loads, and with which kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qplug import Capability, ModelView, QuantArgs, Scheme
from qplug_compressed_tensors.configuration import format_of
from qplug_compressed_tensors.exporter import CompressedTensors
from qplug_compressed_tensors.rules import RULES, no_cache_scales, one_format

_GPU = "SGLang 0.5.16 on H200 (groups: 128)"
_GROUPS = (32, 64, 128, -1)
_NO_STATIC_INT8 = (
    "SGLang ignores input_scale of int8 and fails while loading; W8A8 finds scales at run time"
)

# SGLang does not pad: a shape outside Marlin's tiles passes its checks and breaks later.
CAPABILITIES = (
    Capability("W4A16", "Marlin", True, _GROUPS, 64, 128, _GPU),
    Capability("W4A16_ASYM", "Marlin", True, _GROUPS, 64, 128, _GPU),
    Capability("W8A16", "Marlin", True, _GROUPS, 64, 128, _GPU),
    Capability("W8A8", "int8_scaled_mm", True, (), 8, 16, _GPU),
    Capability("W8A8_STATIC", _NO_STATIC_INT8, False, evidence="SGLang 0.5.16 on H200"),
    Capability("FP8", "fp8_scaled_mm", True, (), 16, 16, _GPU),
    Capability("FP8_DYNAMIC", "fp8_scaled_mm", True, (), 16, 16, _GPU),
    Capability("FP8_BLOCK", "Triton fp8", True, (), 128, 128, _GPU),
)


class SGLang(CompressedTensors):
    """Folders that SGLang serves, and vLLM too."""

    name = "sglang"
    quant_method = None
    serve_command = "python -m sglang.launch_server --model-path {}"
    ignores_substrings = True
    rules = (*RULES, one_format, no_cache_scales)

    @classmethod
    def capabilities(cls) -> Sequence[Capability]:
        return CAPABILITIES

    def refuses(self, model: ModelView, schemes: Mapping[str, Scheme]) -> str | None:
        formats = sorted({found for s in schemes.values() if (found := format_of(s))})
        if len(formats) > 1:
            return f"SGLang reads one format in a folder, not {' and '.join(formats)}"
        return super().refuses(model, schemes)

    def refuses_cache(self, cache: QuantArgs) -> str | None:
        return (
            "SGLang drops the scales of a KV cache in silence; leave the option out, and serve "
            "with --kv-cache-dtype fp8_e4m3, which works with scales of 1"
        )
