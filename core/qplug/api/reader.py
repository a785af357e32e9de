"""What a reader is: how a checkpoint that somebody quantized is read as a float checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from qplug.api.block import QuantizedWeight
from qplug.api.scheme import Scheme
from qplug.api.tensors import FLOAT_DTYPES, ComputedTensor, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

#: The fields of config.json that say how weights are quantized.
QUANTIZATION = ("quantization_config", "compression_config")
#: The field of config.json with the configuration of the language model of a larger model.
_TEXT = "text_config"


@dataclass(frozen=True, eq=False, kw_only=True)
class CodedTensor(ComputedTensor):
    """A float weight ``[out, in]`` that is stored as codes and scales which qplug can store too.

    ``scheme``: how weights and inputs are quantized. ``unpack`` takes the values of ``parts`` and
    returns the codes; it raises QplugError if the values have no place in ``scheme``.
    """

    scheme: Scheme
    unpack: Callable[[Mapping[str, Tensor]], QuantizedWeight]

    def codes(self) -> QuantizedWeight:
        """Returns the stored codes and scales, read from files."""
        return self.unpack(self.values())


class Reader(ABC):
    """How checkpoints in one quantized format are read as the float checkpoints they stand for.

    A reader is a constant: methods depend on arguments alone. ``name`` is lower case, digits and
    hyphens. The first line of the docstring of its class is its description.
    """

    name: ClassVar[str]

    @abstractmethod
    def reads(self, config: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with this config.json is in the format of the reader."""

    @abstractmethod
    def as_float(
        self, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
    ) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        """The configuration and the tensors of the float checkpoint, by its names.

        Weights are computed as they are read: a ``ComputedTensor`` for each, or a ``CodedTensor``
        where qplug has a scheme for the codes, so that ``qplug convert`` can keep them. Raises
        QplugError if a scale is missing, or has a wrong dtype or a shape that does not fit.
        """

    def describe(self, config: Mapping[str, Any]) -> str:
        """What the weights are quantized with, in a few words for users; by default the name."""
        return self.name

    @staticmethod
    def quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The part of config.json that says how weights are quantized; empty if there is none.

        The part may be in the configuration of the language model of a larger model.
        """
        for place in _places(config):
            for key in QUANTIZATION:
                if isinstance(found := place.get(key), Mapping):
                    return found
        return {}

    @staticmethod
    def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of config.json without the parts that say how weights are quantized."""
        floats = {key: value for key, value in config.items() if key not in QUANTIZATION}
        if isinstance(text := floats.get(_TEXT), Mapping):
            floats[_TEXT] = {k: value for k, value in text.items() if k not in QUANTIZATION}
        return floats

    @staticmethod
    def float_dtype(config: Mapping[str, Any]) -> str:
        """The dtype of the float checkpoint by config.json; bfloat16 if it does not say."""
        for place in _places(config):
            for key in ("dtype", "torch_dtype"):
                if place.get(key) in FLOAT_DTYPES:
                    return str(place[key])
        return "bfloat16"


def _places(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the mappings of config.json that may describe the language model."""
    text = config.get(_TEXT)
    return [config, text] if isinstance(text, Mapping) else [config]
