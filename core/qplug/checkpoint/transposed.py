"""Matrices that a checkpoint stores as ``[in, out]``, seen as ``weight: [out, in]``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from qplug.api import StoredTensor, TensorSpec
from qplug.api.tensors import ComputedTensor

if TYPE_CHECKING:
    from torch import Tensor


def transposed_tensor(source: StoredTensor) -> ComputedTensor:
    """Returns the matrix ``source`` with rows and columns exchanged, computed as it is read."""
    return ComputedTensor(
        spec=transposed_spec(source.spec), parts={"matrix": source}, make=_transposed
    )


def transposed_spec(spec: TensorSpec) -> TensorSpec:
    """Returns the dtype and the shape of a matrix whose rows and columns are exchanged."""
    rows, columns = spec.shape
    return replace(spec, shape=(columns, rows))


def _transposed(parts: Mapping[str, Tensor]) -> Tensor:
    return parts["matrix"].T.contiguous()
