"""The tensors of a quantized checkpoint by module, and the float tensors that readers make."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qplug import (
    CodedTensor,
    ComputedTensor,
    QplugError,
    QuantizedWeight,
    Scheme,
    StoredTensor,
    TensorSpec,
)

if TYPE_CHECKING:
    from torch import Tensor

#: Tensors that say how inputs and the KV cache are rounded, and nothing of weights, by local name.
_NOT_OF_WEIGHTS = frozenset(
    (
        *("input_scale", "input_scale_ub", "input_zero_point", "input_global_scale"),
        *("activation_scale", "qscale_act", "output_scale", "output_zero_point"),
        *("k_scale", "v_scale", "q_scale", "kv_scale", "k_zero_point", "v_zero_point"),
        *("q_global_scale", "k_global_scale", "v_global_scale"),
    )
)


@dataclass
class Module:
    """The ``tensors`` of the module ``name``, by local name; ``used`` are those that were read."""

    name: str
    tensors: Mapping[str, StoredTensor]
    used: set[str] = field(default_factory=set)

    def find(self, local: str) -> StoredTensor | None:
        """Returns the tensor ``local``, and notes that it is read; None if there is none."""
        if local in self.tensors:
            self.used.add(local)
        return self.tensors.get(local)

    def need(
        self,
        local: str,
        dtypes: Collection[str],
        *shapes: tuple[int, ...],
        of: str,
    ) -> StoredTensor:
        """Returns the tensor ``local``, which must have one of ``dtypes`` and one of ``shapes``.

        Any shape will do if there are no ``shapes``. ``of``: the tensor that is read with it.
        Raises QplugError.
        """
        tensor = self.find(local)
        if tensor is None:
            raise self.wrong(of, f"has no {self.full(local)}")
        if tensor.spec.dtype not in dtypes:
            raise self.wrong(local, f"is {tensor.spec.dtype}, not {' or '.join(dtypes)}")
        if shapes and tensor.spec.shape not in shapes:
            raise self.wrong(
                local, f"is {list(tensor.spec.shape)}, which does not fit {self.full(of)}"
            )
        return tensor

    def wrong(self, local: str, what: str) -> QplugError:
        """Returns an error on the tensor ``local``."""
        path = self.tensors[local].paths[0] if local in self.tensors else None
        return QplugError(f"{f'{path}: ' if path else ''}{self.full(local)} {what}")

    def full(self, local: str) -> str:
        """Returns the full name of the tensor ``local``."""
        return f"{self.name}.{local}" if self.name else local


def read_modules(
    tensors: Mapping[str, StoredTensor],
    floats_of: Callable[[Module], Mapping[str, StoredTensor]],
    format_name: str,
) -> dict[str, StoredTensor]:
    """Returns the tensors of a float checkpoint: those that are stored as float, and those read.

    ``floats_of`` returns what a module's quantized tensors stand for, by local name. Raises
    QplugError if no tensor is quantized.
    """
    modules: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        parent, _, local = name.rpartition(".")
        modules.setdefault(parent, {})[local] = tensor
    floats: dict[str, StoredTensor] = {}
    count = 0
    for name, members in modules.items():
        module = Module(name, members)
        made = floats_of(module)
        count += len(made)
        for local, tensor in members.items():
            if local not in module.used and local not in _NOT_OF_WEIGHTS:
                floats[module.full(local)] = tensor
        floats |= {module.full(local): tensor for local, tensor in made.items()}
    if not count:
        folder = next((tensor.paths[0].parent for tensor in tensors.values()), Path())
        raise QplugError(
            f"{folder / 'config.json'}: says that weights are quantized ({format_name}): none is"
        )
    return floats


def coded(
    shape: tuple[int, int],
    dtype: str,
    parts: Mapping[str, StoredTensor],
    scheme: Scheme,
    unpack: Callable[[Mapping[str, Tensor]], QuantizedWeight],
    by_row: Iterable[str] = (),
) -> CodedTensor:
    """Returns the float weight ``shape`` (out, in) in ``dtype`` that ``parts`` unpack to.

    ``scheme`` has the dtype in which scales are stored.
    """

    def make(values: Mapping[str, Tensor]) -> Tensor:
        from qplug.numerics import dequantize

        return dequantize(unpack(values))

    return CodedTensor(
        spec=TensorSpec(dtype, shape),
        parts=parts,
        make=make,
        by_row=frozenset(by_row),
        scheme=scheme,
        unpack=unpack,
    )


def computed(
    shape: tuple[int, ...],
    dtype: str,
    parts: Mapping[str, StoredTensor],
    make: Callable[[Mapping[str, Tensor]], Tensor],
    by_row: Iterable[str] = (),
) -> ComputedTensor:
    """Returns the float tensor ``shape`` in ``dtype`` that ``make`` computes of ``parts``."""
    return ComputedTensor(
        spec=TensorSpec(dtype, shape), parts=parts, make=make, by_row=frozenset(by_row)
    )
