"""GGUF for llama.cpp: the format, the engine, and the exporter that names both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from qplug import (
    Capability,
    Engine,
    Exporter,
    Format,
    ModelView,
    NoParams,
    QuantizedWeight,
    Scheme,
    TensorSpec,
)
from qplug_gguf.blocks import WIDTH, block_bytes, from_bytes, to_bytes
from qplug_gguf.file import GGUFFile


class GGUFBlocks(Format):
    """Weights as the bytes of Q8_0 or Q4_0, in a file for models of Llama's architecture."""

    single_file = GGUFFile()

    def refuses(self, model: ModelView, schemes: Mapping[str, Scheme]) -> str | None:
        if model.config.get("model_type") != "llama":
            return f"writes models of type llama, not {model.config.get('model_type')}"
        if model.config.get("attention_bias") or model.config.get("mlp_bias"):
            return "has no place for the biases of this model"
        rope = model.config.get("rope_parameters") or model.config.get("rope_scaling") or {}
        if rope.get("rope_type", "default") != "default":
            return f"does not write rotary embeddings of type {rope['rope_type']}"
        for scheme in schemes.values():
            if scheme.name not in ("W8A16", "W4A16") or scheme.weights.group_size != WIDTH:
                return f"stores W8A16 and W4A16 in groups of {WIDTH}: --group-size {WIDTH}"
        return None

    def scale_dtype(self, scheme: Scheme, model_dtype: str) -> str:
        return "float16"

    def layout(self, shape: tuple[int, int], scheme: Scheme, dtype: str) -> dict[str, TensorSpec]:
        out, width = shape
        row = width // WIDTH * block_bytes(scheme.weights.bits)
        return {"weight": TensorSpec("uint8", (out, row))}

    def pack(self, weight: QuantizedWeight, scheme: Scheme, dtype: str) -> dict[str, Tensor]:
        return {"weight": to_bytes(weight.codes, weight.scale, scheme.weights.bits)}

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        codes, scale = from_bytes(tensors["weight"], scheme.weights.bits)
        return QuantizedWeight(codes, scale, None, scheme.with_scale_dtype("float16").weights)


class LlamaCpp(Engine):
    """llama.cpp, on a CPU."""

    releases: ClassVar = {
        "llama.cpp": (
            Capability("W8A16", "Q8_0", True, (WIDTH,), 1, WIDTH, "run on a CPU", ("cpu",)),
            Capability("W4A16", "Q4_0", True, (WIDTH,), 1, WIDTH, "run on a CPU", ("cpu",)),
        )
    }
    serve_command = "llama-server --model {}/model.gguf"


class GGUF(Exporter[NoParams]):
    """One file that llama.cpp runs: Q8_0 and Q4_0, for models of Llama's architecture."""

    name = "gguf"
    format = GGUFBlocks()
    engine = LlamaCpp()
