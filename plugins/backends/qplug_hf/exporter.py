"""The hf backend writes float weights after all transforms, to quantize or measure them later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qplug import Exporter, Format, NoParams, QplugError, QuantizedWeight, Scheme, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


class TransformedFloat(Format):
    """Stores float weights under the model's own names and in its own dtypes."""

    stores_float = True

    def layout(self, shape: tuple[int, int], scheme: Scheme, dtype: str) -> dict[str, TensorSpec]:
        raise QplugError("a float folder has no codes to lay out")

    def pack(self, weight: QuantizedWeight, scheme: Scheme, dtype: str) -> dict[str, Tensor]:
        raise QplugError("a float folder has no codes to pack")

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        raise QplugError("a float folder has no codes to unpack")


class HuggingFace(Exporter[NoParams]):
    """Writes the transformed model in float, with weights clipped to the ranges that were chosen.

    Every tensor keeps its name and dtype, so that any loader, and a later run of qplug, takes the
    folder. If an algorithm rotates inputs as the model runs, only qplug computes the folder right.
    """

    name = "hf"
    format = TransformedFloat()
