"""The vllm backend writes compressed-tensors folders for vLLM's loader and kernels."""

from __future__ import annotations

from qplug import Exporter, Target
from qplug_compressed_tensors.format import CompressedTensors
from qplug_vllm.engine import VLLM


class VLLMExporter(Exporter[Target]):
    """Writes folders that vLLM serves."""

    name = "vllm"
    Params = Target
    format = CompressedTensors()
    engine = VLLM()
