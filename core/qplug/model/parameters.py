"""Parameters of modules: set and emptied by name, checked, and passed to a call."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from qplug.checkpoint.names import split_name
from qplug.errors import QplugError
from qplug.model.computed import compute_attribute
from qplug.numerics.alike import together
from qplug.numerics.losses import TOO_LARGE, TOO_SMALL, overflowing, too_large, too_small


def refuse_infinite(
    tensors: Mapping[str, Tensor],
    dtype: str = "float32",
    alike: Iterable[Sequence[str]] = (),
) -> None:
    """Raises QplugError for the first of ``tensors`` that cannot be computed with.

    Its values are not finite, or, if it is a matrix, too large or too small for squares in float32,
    or too large for ``dtype``, the model's. ``alike``: names of tensors that may follow one another
    in memory; those of one shape and dtype are read together.
    """
    if not tensors:
        return
    limit = torch.finfo(getattr(torch, dtype)).max
    found = _peaks(tensors, alike)
    for name, value in tensors.items():
        peak = found[name]
        if not math.isfinite(peak):
            raise QplugError(f"{name}: has NaN or infinite values; mend the float model")
        if value.ndim > 1 and peak > limit:
            raise QplugError(f"{name}: {overflowing(peak, dtype)}")
        if value.ndim > 1 and peak > TOO_LARGE:
            raise QplugError(f"{name}: {too_large(peak)}")
        if value.ndim > 1 and 0 < peak < TOO_SMALL:
            raise QplugError(f"{name}: {too_small(peak)}")


def _peaks(tensors: Mapping[str, Tensor], alike: Iterable[Sequence[str]]) -> dict[str, float]:
    """The greatest absolute value of each of ``tensors``; a GPU is waited for once."""
    alike = [
        names for names in alike if len({(tensors[n].shape, tensors[n].dtype) for n in names}) == 1
    ]
    names = [name for names in alike for name in names]
    extremes = [_extremes(together([tensors[name] for name in names])) for names in alike]
    for name in tensors.keys() - {*names}:
        names.append(name)
        extremes.append(_extremes(tensors[name][None]))
    return dict(zip(names, torch.cat(extremes).abs().amax(1).tolist(), strict=True))


def _extremes(values: Tensor) -> Tensor:
    """The least and the greatest of each of ``values: [n, ...]``, float32 ``[n, 2]``.

    Zeros if they are empty.
    """
    rows = values.reshape(len(values), -1)
    if not rows.numel():
        return torch.zeros(len(values), 2, device=values.device)
    if rows.is_floating_point() and rows.element_size() == 1:
        rows = rows.float()  # torch has no minimum of fp8
    # A CPU reads one tensor faster without a dimension.
    found = torch.aminmax(rows[0]) if len(rows) == 1 else torch.aminmax(rows, dim=1)
    return torch.stack([each.view(-1) for each in found], dim=1).float()


def fill_parameters(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set the parameters and buffers of ``module`` named in ``values``."""
    for name, value in values.items():
        set_parameter(module, name, value)


def compute_on(model: nn.Module, device: torch.device) -> None:
    """Makes the parts of ``model`` that have a ``device`` say that it is ``device``.

    transformers takes that of the first parameter, which may be one that is empty still.
    """
    for module in model.modules():
        if isinstance(getattr(type(module), "device", None), property):
            compute_attribute(module, "device", lambda: device)


def empty_parameters(module: nn.Module, names: Iterable[str]) -> None:
    """Free the memory of the parameters ``names`` of ``module``: empty ones take their place."""
    for name in names:
        set_parameter(module, name, torch.empty(0, device="meta"))


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Set the parameter or buffer ``name`` of ``module``, of any shape; parameters are frozen."""
    path, local = split_name(name)
    owner = module.get_submodule(path)
    if local in owner._buffers:
        owner._buffers[local] = value
    else:
        owner._parameters[local] = nn.Parameter(value, requires_grad=False)
