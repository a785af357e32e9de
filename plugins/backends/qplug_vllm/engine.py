"""What vLLM loads, and with which kernels."""

from __future__ import annotations

from collections.abc import Sequence

from qplug import Capability
from qplug_compressed_tensors.exporter import CompressedTensors

_GPU = "vLLM 0.26 on H200 (groups: 128)"
_BOTH = f"{_GPU}, vLLM 0.32 on CPU (all)"
_GROUPS = (32, 64, 128, -1)

# The multiples are those of the CPU's int4 kernel and of Cutlass; Marlin pads to its tiles.
CAPABILITIES = (
    Capability("W4A16", "Machete or Marlin", True, _GROUPS, 32, 32, _BOTH),
    Capability("W4A16_ASYM", "Machete or Marlin", True, _GROUPS, 32, 32, _BOTH),
    Capability("W8A16", "Machete or Marlin", True, _GROUPS, 32, 32, f"{_GPU}; not on CPU"),
    Capability("W8A8", "Cutlass int8", True, (), 16, 16, _BOTH),
    Capability("W8A8_STATIC", "Cutlass int8", True, (), 16, 16, _BOTH),
    Capability("FP8", "Cutlass fp8", True, (), 16, 16, f"{_GPU}; not on CPU"),
    Capability("FP8_DYNAMIC", "Cutlass fp8", True, (), 16, 16, _BOTH),
    Capability("FP8_BLOCK", "Cutlass or Triton fp8", True, (), 128, 128, f"{_GPU}; not on CPU"),
)


class VLLM(CompressedTensors):
    """Folders that vLLM serves."""

    name = "vllm"
    quant_method = None
    serve_command = "vllm serve {}"

    @classmethod
    def capabilities(cls) -> Sequence[Capability]:
        return CAPABILITIES
