"""What the linears of a block read, seen as calibration tokens go through it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from qplug.api.scheme import Scheme
from qplug.calibration.statistics import Statistics
from qplug.calibration.statistics import share as share_statistics
from qplug.machine.processes import Processes
from qplug.model.experts import rows_of
from qplug.model.hooks import hooked
from qplug.model.input_groups import Group

#: Tokens of each group that are kept as they are; experts share them, but for the least of each.
SAMPLE = 2048
_LEAST_OF_EXPERT = 64
#: Rows of an expert that wait on a CPU: of many experts each has few at a time.
_PATIENCE_OF_EXPERT = 512

#: What entered parts of a block, by their paths, and which tokens of the batch (None: all).
Inputs: TypeAlias = Mapping[str, "tuple[Tensor, Tensor | None]"]


@dataclass(frozen=True)
class Shares:
    """Batches of each process, and which process this one is."""

    batches: Sequence[int]
    rank: int

    def of_sample(self, count: int) -> tuple[int, int]:
        """Of a sample of ``count`` tokens: how many a batch gives, and this process at most."""
        each = -(-count // sum(self.batches))
        return each, max(0, count - each * sum(self.batches[: self.rank]))


class Observation:
    """Statistics of what groups of a block read, by the path of a module that reads it.

    For each group it is taken where the whole tensor is read, and by the first linear of each
    expert that reads some of its tokens.
    """

    def __init__(
        self,
        block: nn.Module,
        structure: Sequence[Group],
        schemes: Mapping[str, Scheme],
        shares: Shares,
        device: torch.device,
        *,
        with_drift: bool,
    ) -> None:
        """``schemes``: of the linears that are quantized, by path within the block."""
        self._block = block
        self._share: dict[str, int] = {}
        self.statistics: dict[str, Statistics] = {}
        for group in structure:
            quantized = [path for path in group.linears if path in schemes]
            if not quantized:
                continue
            linear = block.get_submodule(quantized[0])
            assert isinstance(linear, nn.Linear)
            start = partial(
                Statistics,
                linear.in_features,
                device,
                by_window=any(schemes[path].static_inputs for path in quantized),
                with_drift=with_drift,
            )
            alike = [linears[0] for linears in group.routed]
            if group.experts is None:
                self._share[group.at], room = shares.of_sample(SAMPLE)
                self.statistics[group.at] = start(room)
                count = max(_LEAST_OF_EXPERT, SAMPLE // max(1, len(alike)))
            else:
                alike = [group.at]
                experts = len([*block.get_submodule(group.experts).children()])
                count = max(_LEAST_OF_EXPERT, SAMPLE // experts)
            for path in alike:
                self._share[path], _ = shares.of_sample(count)
                # A process may see all tokens of an expert, or none.
                self.statistics[path] = start(count, patience=_PATIENCE_OF_EXPERT)

    @contextmanager
    def noting(self, kept: dict[str, tuple[Tensor, Tensor | None]]) -> Iterator[None]:
        """Within it, what enters is put into ``kept``."""

        def keep(path: str, x: Tensor) -> None:
            kept[path] = x, rows_of(self._block, path)

        with self._seeing(keep):
            yield

    @contextmanager
    def watching(
        self, length: int, real: Tensor | None, ideal: Inputs, *, stop: bool
    ) -> Iterator[None]:
        """Within it, what enters counts; ``ideal`` has what does in the float model.

        A batch of windows of ``length`` tokens, which have ended where ``real`` is false. ``stop``
        ends the pass when all has been seen.
        """

        def observe(path: str, x: Tensor) -> None:
            rows = rows_of(self._block, path)
            wanted, wanted_rows = ideal.get(path, (None, None))
            self.statistics[path].observe_windows(
                x, self._share[path], length, real, wanted, rows, wanted_rows
            )

        try:
            with self._seeing(observe, stop=stop):
                yield
        except _SeenEnoughError as seen:
            # Whoever caught it on its way and kept it would keep all tensors of the pass, too. And
            # from Python 3.12 on its traceback holds this frame, which holds the one that has it.
            traceback.clear_frames(seen.__traceback__)
            seen.__traceback__ = None

    def share(self, processes: Processes) -> None:
        """Give all ``processes`` what each has seen."""
        share_statistics(list(self.statistics.values()), processes)

    @contextmanager
    def _seeing(self, see: Callable[[str, Tensor], None], *, stop: bool = False) -> Iterator[None]:
        last = [*self.statistics][-1:]

        def show(path: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            see(path, inputs[0])
            if stop and path in last:
                raise _SeenEnoughError

        handles = [
            self._block.get_submodule(path).register_forward_pre_hook(partial(show, path))
            for path in self.statistics
        ]
        with hooked(handles):
            yield


class _SeenEnoughError(Exception):
    """Ends a forward pass whose result nobody wants, once all inputs have been observed."""
