"""Base classes of engines that merge linears, and of engines that load compressed-tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from qplug import Engine, Format, ModelView, Problem, QuantArgs, Scheme, Target
from qplug_compressed_tensors.configuration import Configuration, format_of
from qplug_compressed_tensors.format import CompressedTensors
from qplug_compressed_tensors.fusing import (
    divided_groups,
    fused_problems,
    merged_matrices,
    with_partners,
)
from qplug_compressed_tensors.loader import COMMON, Loader, Loaders
from qplug_compressed_tensors.rules import (
    LOADER_RULES,
    Case,
    Rule,
    loads_head,
    refuses_embedding,
    without_cache_scales,
    without_embedding,
)
from qplug_compressed_tensors.silent import SILENT, lacks_expert

if TYPE_CHECKING:
    from qplug import Checkpoint


@dataclass(frozen=True)
class OwnLayout:
    """Experts that servers load in one layout alone: names of single experts are passed over.

    ``servers``: which of them do so. ``remedy``: what to do, in the words of the command line.
    """

    servers: frozenset[str]
    remedy: str


#: By type of model. load_weights of gpt_oss.py in vLLM 0.32 and in SGLang 0.5.23 reads no others;
#: step3p5.py in SGLang 0.5.23 (also for step3p7) takes the experts out of one tensor for each
#: linear, while that in vLLM 0.32 reads single experts, too.
OWN_LAYOUTS = {
    "gpt_oss": OwnLayout(
        frozenset(("vLLM", "SGLang")),
        "take --backend gpt-oss --scheme MXFP4A16, or --ignore '*.experts.*' to keep them float",
    ),
    **dict.fromkeys(
        ("step3p5", "step3p7"),
        OwnLayout(
            frozenset(("SGLang",)),
            "take --backend vllm, or --ignore '*.experts.*' to keep them float",
        ),
    ),
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
    rules: ClassVar[tuple[Rule, ...]] = (*LOADER_RULES, *SILENT)
    #: What the loader of each release reads; empty for what loaders have in common.
    loaders: ClassVar[Loaders] = {}

    @property
    def loader(self) -> Loader:
        """What the loader of the engine's version reads."""
        releases = [release for held in self.held.values() for release in held]
        return next((self.loaders[each] for each in releases if each in self.loaders), COMMON)

    @property
    def release(self) -> str:
        """The name of the engine and the version for messages: ``SGLang 0.5.23``."""
        return next((held[0] for held in self.held.values()), "an engine")

    @property
    def servers(self) -> frozenset[str]:
        return super().servers or frozenset(("vLLM", "SGLang"))

    def refuses(
        self, model: ModelView, schemes: Mapping[str, Scheme], target: Target
    ) -> str | None:
        own = OWN_LAYOUTS.get(str(model.config.get("model_type")))
        experts = any(".experts." in name for name in schemes)
        if own is not None and experts and self.servers <= own.servers:
            who = "engines load" if len(own.servers) > 1 else f"{self.release} loads"
            what = "the experts of this model in another layout alone"
            return f"{who} {what}: {own.remedy}"
        sentence = self._refuses_layers(model, schemes) or self._refuses_mixture(schemes)
        on_cpu = target.column.device == "cpu" and bool(self.loaders)
        if sentence is None and on_cpu and model.embedding in schemes:
            return f"{model.embedding}: {self.release} looks up codes on GPUs alone"
        return sentence or super().refuses(model, without_embedding(model, schemes), target)

    def too_narrow(
        self, model: ModelView, schemes: Mapping[str, Scheme], target: Target
    ) -> dict[str, str]:
        return super().too_narrow(model, without_embedding(model, schemes), target)

    def _refuses_layers(self, model: ModelView, schemes: Mapping[str, Scheme]) -> str | None:
        """Why the loader does not read a linear, whatever the other linears are."""
        loader, release = self.loader, self.release
        for name, scheme in schemes.items():
            if name == model.embedding and self.loaders:
                sentence = refuses_embedding(loader, model, scheme)
                if sentence is not None:
                    return f"{name}: {release} {sentence}; leave it out of --override"
            elif name not in model.quantizable and self.loaders:
                if name != model.head:
                    return f"{name}: {release} keeps routers float; add --ignore {name}"
                if not loads_head(loader, scheme):
                    what = f"{release} does not load a head in {scheme.name}"
                    return f"{name}: {what}; add --ignore {name}"
            if lacks_expert(loader, name, scheme):
                what = f"{release} runs no experts in {scheme.name}"
                return f"{name}: {what}; try FP8_DYNAMIC or W4A16"
        return None

    def _refuses_mixture(self, schemes: Mapping[str, Scheme]) -> str | None:
        """Why the loader does not read the linears in one folder."""
        formats = sorted({layout for s in schemes.values() if (layout := format_of(s))})
        if len(formats) < 2:
            return None
        if not self.loader.own_formats:
            return f"{self.release} reads one format in a folder, not {' and '.join(formats)}"
        for name, scheme in schemes.items():
            own = format_of(scheme)
            if ".experts." in name and own in self.loader.one_format_for_experts:
                other = next(each for each in formats if each != own)
                return (
                    f"{name}: {self.release} runs experts in {scheme.name} only in a folder of one "
                    f"format, not beside {other}"
                )
        return None

    def refuses_cache(self, cache: QuantArgs, model: ModelView) -> str | None:
        if cache.strategy not in self.loader.caches:
            return (
                f"{self.release} drops the scales of a KV cache in silence; leave the option out, "
                "and serve with --kv-cache-dtype fp8_e4m3, which uses scales of 1"
            )
        name = without_cache_scales(self.loader, model)
        if name is None:
            return None
        return f"{self.release} drops the scales of {name} in silence; leave the option out"

    def check_folder(
        self, folder: Checkpoint, model: ModelView, format: Format
    ) -> Iterator[Problem]:
        config = folder.config.get("quantization_config") or {}
        if config.get("quant_method") != CompressedTensors.quant_method:
            yield from super().check_folder(folder, model, format)
            return
        parsed = Configuration.parse(config, plain=self.loader.plain, embedding=model.embedding)
        case = Case(folder, model, parsed, format, self.capabilities(), self.loader, self.release)
        for rule in self.rules:
            yield from rule(case)


def half_precision(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The option that serves a float32 checkpoint in bfloat16, since engines default to float16."""
    stated = config.get("dtype") or config.get("torch_dtype")
    return ("--dtype", "bfloat16") if stated == "float32" else ()
