"""Joins the formats that SGLang loads: ModelOpt's where NVFP4 is, else compressed-tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from qplug import Format, ModelView, Problem, QuantArgs, QuantizedWeight, Scheme, TensorSpec
from qplug_compressed_tensors.format import CompressedTensors
from qplug_sglang.members import ALGORITHMS, NVFP4
from qplug_sglang.modelopt import ModelOpt

if TYPE_CHECKING:
    from torch import Tensor

    from qplug import Checkpoint

_MODELOPT = ModelOpt()


@dataclass(frozen=True)
class SGLangFormat(Format):
    """Passes each call on to the format for the scheme, or to the format that config.json names.

    ``compressed``: the format of all schemes but ``own``, as the loader of SGLang's version reads
    it. ``own``: those that are written in ModelOpt's.
    """

    #: That of the format which no other backend has: folders of others are opened by it.
    quant_method: ClassVar[str | None] = ModelOpt.quant_method

    compressed: CompressedTensors
    own: frozenset[Scheme] = field(default=frozenset({NVFP4}))

    def refuses(self, model: ModelView, schemes: Mapping[str, Scheme]) -> str | None:
        return self.compressed.refuses(model, schemes)

    def refuses_cache(self, cache: QuantArgs) -> str | None:
        return self.compressed.refuses_cache(cache)

    def scale_dtype(self, scheme: Scheme, model_dtype: str) -> str:
        return self._of_scheme(scheme).scale_dtype(scheme, model_dtype)

    def layout(self, shape: tuple[int, int], scheme: Scheme, dtype: str) -> dict[str, TensorSpec]:
        return self._of_scheme(scheme).layout(shape, scheme, dtype)

    def pack(self, weight: QuantizedWeight, scheme: Scheme, dtype: str) -> dict[str, Tensor]:
        return self._of_scheme(scheme).pack(weight, scheme, dtype)

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        return self._of_stored(tensors, scheme).unpack(tensors, scheme)

    def input_scale(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor | None:
        return self._of_stored(tensors, scheme).input_scale(tensors, scheme)

    def config(self, model: ModelView, schemes: Mapping[str, Scheme]) -> dict[str, Any] | None:
        is_own = not self.own.isdisjoint(schemes.values())  # FP8 beside them is stored alike
        return (_MODELOPT if is_own else self.compressed).config(model, schemes)

    def with_cache(self, config: dict[str, Any] | None, cache: QuantArgs) -> dict[str, Any] | None:
        return self._of_config(config).with_cache(config, cache)

    def read_schemes(self, config: Mapping[str, Any], model: ModelView) -> dict[str, Scheme]:
        return self._of_config(config).read_schemes(config, model)

    def quantizes_experts(self, config: Mapping[str, Any], name: str) -> bool:
        return self._of_config(config).quantizes_experts(config, name)

    def read_cache(self, config: Mapping[str, Any]) -> QuantArgs | None:
        return self._of_config(config).read_cache(config)

    def stored_shapes(self, folder: Checkpoint) -> dict[str, tuple[int, int]]:
        return self._of_config(folder.config.get("quantization_config")).stored_shapes(folder)

    def check_folder(self, folder: Checkpoint, model: ModelView) -> Iterator[Problem]:
        return self._of_config(folder.config.get("quantization_config")).check_folder(folder, model)

    def _of_scheme(self, scheme: Scheme) -> Format:
        """The format that has the tensors in which qplug writes ``scheme``."""
        return _MODELOPT if scheme in self.own else self.compressed

    def _of_config(self, config: Mapping[str, Any] | None) -> Format:
        """The format that a ``quantization_config`` names."""
        named = (config or {}).get("quant_method")
        return _MODELOPT if named == _MODELOPT.quant_method else self.compressed

    def _of_stored(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Format:
        """A format that reads a linear's ``tensors``: four bits have other tensors in each."""
        stored = {"weight_packed", "input_global_scale"} & tensors.keys()
        is_known = scheme in ALGORITHMS.values()  # ModelOpt reads the fp8 of both
        return _MODELOPT if is_known and not stored else self.compressed
