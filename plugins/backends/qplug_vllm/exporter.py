"""The vllm backend: compressed-tensors folders within what vLLM's loader and kernels take."""

from __future__ import annotations

from qplug import Exporter, Target
from qplug_compressed_tensors.format import CompressedTensors
from qplug_vllm.engine import VLLM


class VLLMExporter(Exporter[Target]):
    """Folders that vLLM serves."""

    name = "vllm"
    Params = Target
    format = CompressedTensors()
    engine = VLLM()
