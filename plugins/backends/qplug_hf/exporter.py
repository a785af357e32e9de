"""Float weights after all transforms and before any rounding: to quantize on, or to measure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qplug import Exporter, Format, NoParams, QplugError, QuantizedWeight, Scheme, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


class TransformedFloat(Format):
    """Float weights under the names and in the dtypes that they have in the model."""

    stores_float = True

    def layout(self, shape: tuple[int, int], scheme: Scheme, dtype: str) -> dict[str, TensorSpec]:
        raise QplugError("a float folder has no codes to lay out")

    def pack(self, weight: QuantizedWeight, scheme: Scheme, dtype: str) -> dict[str, Tensor]:
        raise QplugError("a float folder has no codes to pack")

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        raise QplugError("a float folder holds no codes")


class HuggingFace(Exporter[NoParams]):
    """The transformed model, float: nothing is quantized. Clips that were chosen are cut.

    Every tensor keeps its name and dtype, so that any loader takes the folder, and another run of
    qplug too. Where inputs are to be rotated as the model runs, that is qplug alone.
    """

    name = "hf"
    format = TransformedFloat()
