"""Float weights after all transforms and before any rounding: to quantize on, or to measure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qplug import Exporter, ModelView, NoParams, QplugError, QuantizedWeight, Scheme, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


class HuggingFace(Exporter[NoParams]):
    """The transformed model, float: nothing is quantized. Clips that were chosen are cut.

    Every tensor keeps its name and dtype, so that any loader takes the folder, and another run of
    qplug too. Where inputs are to be rotated as the model runs, that is qplug alone.
    """

    name = "hf"
    stores_float = True
    rotates_online = True

    def layout(self, shape: tuple[int, int], scheme: Scheme, dtype: str) -> dict[str, TensorSpec]:
        raise QplugError("a float folder has no codes to lay out")

    def pack(self, weight: QuantizedWeight, scheme: Scheme, dtype: str) -> dict[str, Tensor]:
        raise QplugError("a float folder has no codes to pack")

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        raise QplugError("a float folder holds no codes")

    def schemes(self, config: Mapping[str, Any], model: ModelView) -> dict[str, Scheme]:
        raise QplugError(f"{self.name}: a folder with a quantization_config is another backend's")

    def config(self, model: ModelView, schemes: Mapping[str, Scheme]) -> dict[str, Any] | None:
        return None
