"""The conversion of parameters in memory to tensors on disk, which is transformers' own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qplug.errors import QplugError
from qplug.model.quiet import quiet_transformers

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

#: What follows for the user from a model that cannot be calibrated.
TAKES_NO_DATA = (
    "so algorithms that need calibration data cannot take this architecture; use one that needs "
    "none, such as rtn"
)


def converted(model: PreTrainedModel, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors on disk, by name, that hold the parameters of ``model`` with ``values``.

    Raises QplugError if the conversion needs more parameters than these.
    """
    from transformers.core_model_loading import revert_weight_conversion

    try:
        with quiet_transformers():
            on_disk: dict[str, Tensor] = revert_weight_conversion(model, dict(values))
    except Exception as error:  # transformers raises anything for a parameter that it misses
        raise unknown(next(iter(values))) from error
    return on_disk


def unknown(name: str) -> QplugError:
    """The error for a parameter, or module, ``name`` whose place on disk is not found."""
    return QplugError(f"{name}: is stored in parts that qplug cannot put together, {TAKES_NO_DATA}")
