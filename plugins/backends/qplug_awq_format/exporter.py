"""The awq backend: AWQ folders for vLLM and SGLang."""

from __future__ import annotations

from collections.abc import Mapping

from qplug import Exporter, ModelView, Scheme, Target
from qplug_awq_format.capabilities import RELEASES
from qplug_awq_format.format import AWQ, names_of_floats
from qplug_compressed_tensors.engine import MergingEngine
from qplug_compressed_tensors.fusing import with_merged_names


class AWQLoader(MergingEngine):
    """vLLM and SGLang, as they load AWQ folders."""

    releases = RELEASES
    serve_command = "vllm serve {}"

    def refuses(
        self, model: ModelView, schemes: Mapping[str, Scheme], target: Target
    ) -> str | None:
        sentence = super().refuses(model, schemes, target)
        return sentence or _float_name_within_another(model, schemes)


class AWQExporter(Exporter[Target]):
    """The AWQ format: int4 weights with zero points, outputs packed in AWQ's order.

    One scheme serves a whole folder.
    """

    name = "awq"
    Params = Target
    format = AWQ()
    engine = AWQLoader()


def _float_name_within_another(model: ModelView, schemes: Mapping[str, Scheme]) -> str | None:
    """A sentence if the name of a float linear is a part of a quantized linear's name."""
    for entry in names_of_floats(model, schemes):
        hit = next((name for name in with_merged_names(schemes) if entry in name), None)
        if hit is not None:
            return f"{entry} is to stay float, but engines would take {hit} for it too"
    return None
