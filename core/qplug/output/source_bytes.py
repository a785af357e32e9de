"""Checksums of the float tensors that each step of a run read, so that no other model is mixed in.

A run notes them as it goes: of bytes that it reads or copies anyway, and of few others. A resumed
run computes them again for the steps that are finished, as fast as the disk reads: the files may
have the same sizes and times, and other weights.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from qplug.api.tensors import Checkpoint, StoredTensor
from qplug.checkpoint.into_memory import READERS, is_plain
from qplug.checkpoint.tensor_file import tensor_bytes
from qplug.output.checksums import crc32
from qplug.output.plan import Plan, Step

if TYPE_CHECKING:
    from torch import Tensor


class SourceBytes:
    """The stored tensors of the float model ``checkpoint`` that each step of ``plan`` depends on.

    ``blocks`` are the steps that depend on the outputs of earlier ones, in order; the first one
    depends on all tensors outside of the blocks too, such as the embedding.
    """

    def __init__(self, plan: Plan, checkpoint: Checkpoint, blocks: Sequence[str] = ()) -> None:
        self._plan, self._tensors = plan, checkpoint.tensors
        self._blocks = blocks
        self._known: dict[str, int] = {}  # the CRC-32 of stored bytes, by name of their tensor

    def see(self, name: str, value: Tensor) -> None:
        """Notes the checksum of tensor ``name``, whose stored bytes were read as ``value``.

        Threads may call this at once. A tensor that is computed as it is read is passed over.
        """
        if is_plain(self._tensors[name]):
            self.note(name, crc32([tensor_bytes(value)]))

    def note(self, name: str, crc: int) -> None:
        """Notes ``crc``, the CRC-32 of the stored bytes of tensor ``name``."""
        self._known[name] = crc

    def of_step(self, number: int) -> int:
        """Returns the checksum of the tensors that step ``number`` depends on.

        Those of which none was noted are read.
        """
        known: dict[int, int] = {}  # by id of the tensor in a file
        for name in (name for step in self._steps(number) for name in _names(step)):
            tensor = self._tensors.get(name)
            if tensor is not None and name in self._known:
                known[id(tensor)] = self._known[name]
        leaves = self._leaves(self._steps(number))
        crcs = known | _read({id(leaf): leaf for leaf in leaves if id(leaf) not in known})
        return self._joined(crcs[id(leaf)] for leaf in leaves)

    def of_model(self) -> int:
        """Returns the checksum of all tensors; reads them."""
        return self._joined(crc32(leaf.chunks()) for leaf in self._leaves(self._plan.steps))

    def are_as_noted(self, steps: Mapping[int, object], model: object = None) -> bool:
        """Whether the checksums of ``steps``, by number, are still right.

        ``model`` is the checksum of all tensors, if one was noted. Each tensor is read once.
        """
        wanted = {number: self._leaves(self._steps(number)) for number in steps}
        whole = self._leaves(self._plan.steps) if model is not None else []
        each = {id(leaf): leaf for leaves in (*wanted.values(), whole) for leaf in leaves}
        crcs = _read(each)
        now = {n: self._joined(crcs[id(leaf)] for leaf in wanted[n]) for n in wanted}
        return now == dict(steps) and (
            model is None or model == self._joined(crcs[id(leaf)] for leaf in whole)
        )

    def _steps(self, number: int) -> list[Step]:
        """Returns the step, and before it those outside of blocks if it is the first block."""
        steps, step = self._plan.steps, self._plan.steps[number]
        is_first = bool(self._blocks) and step.name == self._blocks[0]
        outside = [each for each in steps if each.name not in self._blocks] if is_first else []
        return [*outside, step]

    def _leaves(self, steps: Iterable[Step]) -> list[StoredTensor]:
        """Returns the tensors in files that ``steps`` read, in order."""
        return [leaf for step in steps for name in _names(step) for leaf in self._leaves_of(name)]

    def _leaves_of(self, name: str) -> Iterator[StoredTensor]:
        tensor = self._tensors.get(name)
        return tensor.leaves() if tensor is not None else iter(())

    @staticmethod
    def _joined(crcs: Iterable[int]) -> int:
        return zlib.crc32(" ".join(map(str, crcs)).encode())


def _read(tensors: Mapping[int, StoredTensor]) -> dict[int, int]:
    """Returns the CRC-32 of the bytes of ``tensors``, by their keys; several are read at once."""
    if not tensors:
        return {}
    with ThreadPoolExecutor(READERS, "qplug-checker") as pool:
        computed = pool.map(lambda tensor: crc32(tensor.chunks()), tensors.values())
        return dict(zip(tensors, computed, strict=True))


def _names(step: Step) -> list[str]:
    return [*(f"{name}.weight" for name in step.linears), *step.others]
