"""MXFP4 as gpt-oss is published: the experts of a layer in one tensor, gate and up in turn."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from qplug import (
    PRESETS,
    Format,
    ModelView,
    QplugError,
    QuantizedWeight,
    Scheme,
    Stacked,
    TensorSpec,
)
from qplug_compressed_tensors import fp4

if TYPE_CHECKING:
    from torch import Tensor

    from qplug import Checkpoint

MXFP4 = PRESETS["MXFP4A16"]
#: Values in a group, and the bytes that they take.
GROUP, _BYTES = 32, 16

#: The stored tensors of a layer, and the linears whose rows they hold, in turn.
_STORED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_LOCALS = {"weight_blocks": "_blocks", "weight_scales": "_scales", "bias": "_bias"}
_MEMBER = re.compile(
    r"(.*\.experts)\.\d+\.(gate_proj|down_proj)\.(weight_blocks|weight_scales|bias)"
)
_WHOLE = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(_blocks|_scales|_bias)")
#: Modules that stay float, in the words of the published config.json.
_FLOATS = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")


def is_expert(name: str) -> bool:
    """Whether the linear ``name`` belongs to an expert."""
    return ".experts." in name


class GptOssMXFP4(Format):
    """Stores experts in groups of 32 e2m1, two in a byte, with scales that are powers of two.

    ``gate_up_proj_blocks``: uint8 ``[experts, 2 * inner, in / 32, 16]``, rows of gate and up in
    turn; ``gate_up_proj_scales``: uint8 ``[experts, 2 * inner, in / 32]``, exponents with a bias of
    127; ``gate_up_proj_bias``: ``[experts, 2 * inner]``. ``down_proj`` likewise.
    """

    quant_method: ClassVar[str | None] = "mxfp4"

    def refuses(self, model: ModelView, schemes: Mapping[str, Scheme]) -> str | None:
        if not any(is_expert(name) for name in model.linears):
            return "the layout has a place for experts alone, and the model has none"
        wrong = next((scheme for scheme in schemes.values() if scheme != MXFP4), None)
        return None if wrong is None else f"the layout stores only MXFP4A16, not {wrong.name}"

    def layout(self, shape: tuple[int, int], scheme: Scheme, dtype: str) -> dict[str, TensorSpec]:
        out, groups = shape[0], shape[1] // GROUP
        return {
            "weight_blocks": TensorSpec("uint8", (out, groups, _BYTES)),
            "weight_scales": TensorSpec("uint8", (out, groups)),
        }

    def pack(self, weight: QuantizedWeight, scheme: Scheme, dtype: str) -> dict[str, Tensor]:
        packed = fp4.pack(weight, scheme)
        blocks = packed["weight_packed"].unflatten(1, (-1, _BYTES))
        return {"weight_blocks": blocks, "weight_scales": packed["weight_scale"]}

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        packed = {
            "weight_packed": tensors["weight_blocks"].flatten(1),
            "weight_scale": tensors["weight_scales"],
        }
        return fp4.unpack(packed, scheme)

    def stacked(self, tensors: Collection[str]) -> dict[str, Stacked]:
        names, found = {*tensors}, {}
        for name in tensors:
            match = _MEMBER.fullmatch(name)
            if match is None:
                continue
            experts, linear, local = match.groups()
            stored = next(whole for whole, linears in _STORED.items() if linear in linears)
            numbers = 0
            while f"{experts}.{numbers}.{linear}.{local}" in names:
                numbers += 1
            found[f"{experts}.{stored}{_LOCALS[local]}"] = _stacked(experts, stored, local, numbers)
        return found

    def unstacked(self, tensors: Mapping[str, TensorSpec]) -> dict[str, Stacked]:
        found = {}
        for name, spec in tensors.items():
            match = _WHOLE.fullmatch(name)
            if match is not None:
                experts, stored, suffix = match.groups()
                local = next(local for local, end in _LOCALS.items() if end == suffix)
                found[name] = _stacked(experts, stored, local, spec.shape[0])
        return found

    def config(self, model: ModelView, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
        return {"quant_method": self.quant_method, "modules_to_not_convert": [*_FLOATS]}

    def read_schemes(self, config: Mapping[str, Any], model: ModelView) -> dict[str, Scheme]:
        if config.get("quant_method") != self.quant_method:
            raise QplugError(f"quant_method is {config.get('quant_method')!r}, not mxfp4")
        return {name: MXFP4 for name in model.linears if is_expert(name)}

    def quantizes_experts(self, config: Mapping[str, Any], name: str) -> bool:
        return True

    def stored_shapes(self, folder: Checkpoint) -> dict[str, tuple[int, int]]:
        return {
            tensor.removesuffix(".weight_blocks"): (stored.spec.shape[0], GROUP * groups)
            for tensor, stored in folder.tensors.items()
            if tensor.endswith(".weight_blocks")
            for groups in (stored.spec.shape[1],)
        }


def _stacked(experts: str, stored: str, local: str, count: int) -> Stacked:
    linears = _STORED[stored]
    members = tuple(
        tuple(f"{experts}.{number}.{linear}.{local}" for linear in linears)
        for number in range(count)
    )
    return Stacked(members, interleaved=len(linears) > 1)
