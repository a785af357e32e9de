"""The gpt-oss backend writes experts in MXFP4 as gpt-oss is published, for vLLM and SGLang."""

from __future__ import annotations

from collections.abc import Mapping

from qplug import BuiltFloat, Engine, Exporter, ModelView, Scheme, Target
from qplug_gpt_oss.capabilities import RELEASES
from qplug_gpt_oss.format import GptOssMXFP4, is_expert

_NO_PLACE = BuiltFloat(
    "the layout has a place for experts alone",
    source="config.json of gpt-oss as published: modules_to_not_convert",
)


class GptOssLoader(Engine):
    """The loaders of vLLM and SGLang for gpt-oss."""

    releases = RELEASES
    serve_command = "vllm serve {}"

    def refuses(
        self, model: ModelView, schemes: Mapping[str, Scheme], target: Target
    ) -> str | None:
        if model.config.get("model_type") != "gpt_oss":
            return "engines load this layout for gpt-oss alone; take --backend vllm or sglang"
        return super().refuses(model, schemes, target)


class GptOssExporter(Exporter[Target]):
    """Writes gpt-oss in its own layout: experts in MXFP4, everything else float."""

    name = "gpt-oss"
    Params = Target
    format = GptOssMXFP4()
    engine = GptOssLoader()

    def built_float(self, model: ModelView) -> dict[str, BuiltFloat]:
        others = [name for name in model.linears if not is_expert(name)]
        return {**dict.fromkeys(others, _NO_PLACE), **super().built_float(model)}
