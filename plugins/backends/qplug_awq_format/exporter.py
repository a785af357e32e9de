"""The awq backend writes AWQ folders for vLLM and SGLang."""

from __future__ import annotations

from collections.abc import Mapping

from qplug import Exporter, ModelView, Scheme, Target
from qplug_awq_format.capabilities import RELEASES
from qplug_awq_format.format import AWQ, names_of_floats
from qplug_compressed_tensors.engine import MergingEngine
from qplug_compressed_tensors.fusing import with_merged_names


class AWQLoader(MergingEngine):
    """The rules by which vLLM and SGLang load AWQ folders."""

    releases = RELEASES
    serve_command = "vllm serve {}"

    def refuses(
        self, model: ModelView, schemes: Mapping[str, Scheme], target: Target
    ) -> str | None:
        sentence = super().refuses(model, schemes, target)
        return sentence or _float_name_within_another(model, schemes)


class AWQExporter(Exporter[Target]):
    """Writes the AWQ format: int4 weights with zero points, outputs packed in AWQ's order.

    All quantized layers of a folder share one scheme.
    """

    name = "awq"
    Params = Target
    format = AWQ()
    engine = AWQLoader()


def _float_name_within_another(model: ModelView, schemes: Mapping[str, Scheme]) -> str | None:
    """A refusal if the name of a float linear is part of a quantized linear's name, else None."""
    for entry in names_of_floats(model, schemes):
        hit = next((name for name in with_merged_names(schemes) if entry in name), None)
        if hit is not None:
            return f"{entry} is to stay float, but then engines would load {hit} as float too"
    return None
