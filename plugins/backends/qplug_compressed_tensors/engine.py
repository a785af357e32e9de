"""Base classes of engines that merge linears, and of engines that load compressed-tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from qplug import Engine, Format, ModelView, Problem, Scheme, Target
from qplug_compressed_tensors.configuration import Configuration
from qplug_compressed_tensors.format import CompressedTensors
from qplug_compressed_tensors.fusing import (
    divided_groups,
    fused_problems,
    merged_matrices,
    with_partners,
)
from qplug_compressed_tensors.rules import LOADER_RULES, Case, Rule, head_and_embedding_are_float
from qplug_compressed_tensors.silent import SILENT

if TYPE_CHECKING:
    from qplug import Checkpoint


#: What to do for models whose experts engines load in a layout of their own, by type of model:
#: load_weights of gpt_oss.py in vLLM 0.32 and in SGLang 0.5.23 passes over other names in silence.
OWN_LAYOUTS = {
    "gpt_oss": "take --backend gpt-oss --scheme MXFP4A16, or --ignore '*.experts.*' to keep them "
    "float"
}


class MergingEngine(Engine):
    """An engine that merges q, k and v into one matrix, and stacks experts, when it loads."""

    def refuses(
        self, model: ModelView, schemes: Mapping[str, Scheme], target: Target
    ) -> str | None:
        for group in divided_groups(model.linears, schemes):
            names = ", ".join(group[:3])
            return f"engines fuse {names} into one matrix, so they must share one scheme"
        return super().refuses(model, schemes, target)

    def too_narrow(
        self, model: ModelView, schemes: Mapping[str, Scheme], target: Target
    ) -> dict[str, str]:
        return with_partners(super().too_narrow(model, schemes, target), schemes)

    def merged(self, names: Sequence[str]) -> list[list[str]]:
        return merged_matrices(names)

    def check_folder(
        self, folder: Checkpoint, model: ModelView, format: Format
    ) -> Iterator[Problem]:
        yield from super().check_folder(folder, model, format)
        config = folder.config.get("quantization_config")
        if config is not None:
            yield from fused_problems(model.linears, format.read_schemes(config, model))


class CompressedTensorsLoader(MergingEngine):
    """Checks a compressed-tensors folder by rules of all engines; each engine adds its own."""

    #: The rules of the loader, in addition to the rules of the format.
    rules: ClassVar[tuple[Rule, ...]] = (*LOADER_RULES, head_and_embedding_are_float, *SILENT)
    #: Whether plain entries of ``ignore`` also match as parts of a name.
    ignores_substrings: ClassVar[bool] = False

    @property
    def servers(self) -> frozenset[str]:
        return super().servers or frozenset(("vLLM", "SGLang"))

    def refuses(
        self, model: ModelView, schemes: Mapping[str, Scheme], target: Target
    ) -> str | None:
        own = OWN_LAYOUTS.get(str(model.config.get("model_type")))
        if own is not None and any(".experts." in name for name in schemes):
            return f"engines load the experts of this model in another layout alone: {own}"
        return super().refuses(model, schemes, target)

    def check_folder(
        self, folder: Checkpoint, model: ModelView, format: Format
    ) -> Iterator[Problem]:
        config = folder.config.get("quantization_config") or {}
        if config.get("quant_method") != CompressedTensors.quant_method:
            yield from super().check_folder(folder, model, format)
            return
        parsed = Configuration.parse(config, ignores_substrings=self.ignores_substrings)
        case = Case(folder, model, parsed, format, self.capabilities())
        for rule in self.rules:
            yield from rule(case)


def half_precision(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The option that serves a float32 checkpoint in bfloat16, since engines default to float16."""
    stated = config.get("dtype") or config.get("torch_dtype")
    return ("--dtype", "bfloat16") if stated == "float32" else ()
