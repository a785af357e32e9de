"""The gptq backend writes GPTQ folders for vLLM and SGLang."""

from __future__ import annotations

from collections.abc import Mapping

from qplug import Exporter, ModelView, Scheme, Target
from qplug_compressed_tensors.engine import MergingEngine
from qplug_gptq_format.capabilities import RELEASES
from qplug_gptq_format.format import GPTQ


class GPTQLoader(MergingEngine):
    """The rules by which vLLM and SGLang load GPTQ folders."""

    releases = RELEASES
    serve_command = "vllm serve {}"

    def refuses(
        self, model: ModelView, schemes: Mapping[str, Scheme], target: Target
    ) -> str | None:
        draft = next((name for name in schemes if name in model.drafts and "mtp" in name), None)
        if draft is not None:
            return (
                f"{draft}: vLLM loads all of mtp as float if an entry of dynamic names a part of "
                "it, and mtp.fc is such a part; take --mtp keep or another backend"
            )
        return super().refuses(model, schemes, target)


class GPTQExporter(Exporter[Target]):
    """Writes the GPTQ format: symmetric int4 or int8 weights, columns in their own order.

    All quantized layers of a folder share one scheme. All zero points are the middle code, and are
    stored as the middle code minus 1.
    """

    name = "gptq"
    Params = Target
    format = GPTQ()
    engine = GPTQLoader()
