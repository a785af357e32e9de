"""Watches what interpreted kernels read and write.

A GPU does not say that a kernel reads beyond its tensors, or that its programs, which run in any
order there, disturb one another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

Addresses = npt.NDArray[np.uint64]


class Launch:
    """The accesses of the programs of one launch, which is given ``arguments``."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        tensors = [one for one in arguments if isinstance(one, torch.Tensor)]
        self._ranges = {(own.data_ptr(), own.data_ptr() + _extent(own)) for own in tensors}
        self._loads: list[tuple[Addresses, Addresses]] = []
        self._stores: list[tuple[Addresses, Addresses]] = []

    def load(self, program: int, addresses: Addresses, size: int) -> None:
        self._check(addresses, size, "reads")
        self._loads.append((addresses, np.full(addresses.shape, program, np.uint64)))

    def store(self, program: int, addresses: Addresses, size: int) -> None:
        self._check(addresses, size, "writes")
        assert len(np.unique(addresses)) == len(addresses), "a program writes twice to one place"
        self._stores.append((addresses, np.full(addresses.shape, program, np.uint64)))

    def _check(self, addresses: Addresses, size: int, verb: str) -> None:
        inside = np.zeros(addresses.shape, bool)
        for start, stop in self._ranges:
            inside |= (addresses >= start) & (addresses + size <= stop)
        assert inside.all(), f"a program {verb} what is in no tensor of its kernel"

    def end(self) -> None:
        """Checks that no program reads or writes what another one writes."""
        assert self._stores, "the kernel writes nothing"
        stored, programs = (np.concatenate(parts) for parts in zip(*self._stores, strict=True))
        order = np.argsort(stored)
        stored, programs = stored[order], programs[order]
        again = stored[1:] == stored[:-1]
        assert (programs[1:] == programs[:-1])[again].all(), "two programs write to one place"
        loaded, readers = (np.concatenate(parts) for parts in zip(*self._loads, strict=True))
        place = np.searchsorted(stored, loaded).clip(max=len(stored) - 1)
        foreign = (stored[place] == loaded) & (programs[place] != readers)
        assert not foreign.any(), "a program reads what another one writes"


def _extent(tensor: torch.Tensor) -> int:
    """The bytes from the first to the last element of ``tensor``."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return (last + 1) * tensor.element_size() if tensor.numel() else 0


def watch(interpreter: Any, patch: pytest.MonkeyPatch) -> None:
    """Has each launch that ``interpreter``, a module of Triton, executes checked by ``Launch``."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    execute, arguments_on_host = executor.__call__, executor._init_args_hst
    launches: list[Launch] = []

    def begun(self: Any, arguments: Any, named: Any) -> Any:
        found = arguments_on_host(self, arguments, named)
        launches.append(Launch([*found[0], *found[1].values()]))
        return found

    def executed(self: Any, *arguments: Any, **named: Any) -> None:
        execute(self, *arguments, **named)
        launches.pop().end()

    def loaded(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        _tell(launches[-1].load, self, pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def written(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        _tell(launches[-1].store, self, pointers, mask)
        return store(self, pointers, value, mask, *rest, **named)

    patch.setattr(executor, "_init_args_hst", begun)
    patch.setattr(executor, "__call__", executed)
    patch.setattr(builder, "create_masked_load", loaded)
    patch.setattr(builder, "create_masked_store", written)


def _tell(
    what: Callable[[int, Addresses, int], None], builder: Any, pointers: Any, mask: Any
) -> None:
    places = np.broadcast_to(pointers.data, mask.data.shape)[mask.data]
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    x, y, z = builder.grid_idx
    _, height, depth = builder.grid_dim
    what((x * height + y) * depth + z, places.astype(np.uint64), size)
