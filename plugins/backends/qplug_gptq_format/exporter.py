"""The gptq backend writes GPTQ folders for vLLM and SGLang."""

from __future__ import annotations

from qplug import Exporter, Target
from qplug_compressed_tensors.engine import MergingEngine
from qplug_gptq_format.capabilities import RELEASES
from qplug_gptq_format.format import GPTQ


class GPTQLoader(MergingEngine):
    """The rules by which vLLM and SGLang load GPTQ folders."""

    releases = RELEASES
    serve_command = "vllm serve {}"


class GPTQExporter(Exporter[Target]):
    """Writes the GPTQ format: symmetric int4 or int8 weights, columns in their own order.

    All quantized layers of a folder share one scheme. All zero points are the middle code, and are
    stored as the middle code minus 1.
    """

    name = "gptq"
    Params = Target
    format = GPTQ()
    engine = GPTQLoader()
