"""Reads the weights of blocks, one block ahead of the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from qplug.api.tensors import Checkpoint
from qplug.checkpoint.into_memory import READERS, See, all_into_memory
from qplug.machine.stopwatch import Stopwatch

if TYPE_CHECKING:
    from torch import Tensor


class BlockReader:
    """Reads the parameters of a block in threads, while the run works on the block before.

    ``parameters``: the relative names of each block's parameters, by block, in order.
    """

    def __init__(
        self,
        source: Checkpoint,
        parameters: Mapping[str, Sequence[str]],
        clock: Stopwatch,
        *,
        pinned: bool = False,
        see: See | None = None,
    ) -> None:
        """``pinned``: use page-locked memory, from which a GPU copies asynchronously.

        ``see`` is called for tensors whose values are stored bytes, and not computed.
        """
        self._pinned, self._see = pinned, see
        self._source, self._parameters, self._clock = source, parameters, clock
        self._following = dict(zip(parameters, [*parameters][1:], strict=False))
        self._thread = ThreadPoolExecutor(1, "qplug-block-reader")
        self._readers = ThreadPoolExecutor(READERS, "qplug-reader")
        self._coming: dict[str, Future[dict[str, Tensor]]] = {}

    def start(self, block: str) -> None:
        """Begin to read ``block``, unless that has begun."""
        if block not in self._coming:
            self._coming[block] = self._thread.submit(self._read, block)

    def read(self, block: str) -> dict[str, Tensor]:
        """The parameters of ``block``, on the CPU unless a rewrite made them on the GPU.

        Begins to read the next block.
        """
        self.start(block)
        with self._clock("reading"):
            weights = self._coming.pop(block).result()
        if block in self._following:
            self.start(self._following[block])
        return weights

    def _read(self, block: str) -> dict[str, Tensor]:
        names = {f"{block}.{local}": local for local in self._parameters[block]}
        tensors = {name: self._source.tensors[name] for name in names}
        read = all_into_memory(tensors, self._readers, page_locked=self._pinned, see=self._see)
        return {names[name]: value for name, value in read.items()}
