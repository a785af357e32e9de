"""The gptq backend: GPTQ folders for vLLM and SGLang."""

from __future__ import annotations

from qplug import Exporter, Target
from qplug_compressed_tensors.engine import MergingEngine
from qplug_gptq_format.capabilities import RELEASES
from qplug_gptq_format.format import GPTQ


class GPTQLoader(MergingEngine):
    """vLLM and SGLang, as they load GPTQ folders."""

    releases = RELEASES
    serve_command = "vllm serve {}"


class GPTQExporter(Exporter[Target]):
    """The GPTQ format: int4 or int8 weights, symmetric, columns in their own order.

    One scheme serves a whole folder. Zero points are all the middle code, stored less one.
    """

    name = "gptq"
    Params = Target
    format = GPTQ()
    engine = GPTQLoader()
