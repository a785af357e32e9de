"""Statistics of what the linears of a block read, gathered while calibration tokens pass."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from qplug.api.scheme import Scheme
from qplug.calibration.statistics import Statistics
from qplug.calibration.statistics import share as share_statistics
from qplug.machine.processes import Processes
from qplug.model.experts import rows_of, seeing_all
from qplug.model.hooks import hooked
from qplug.model.input_groups import GroupPaths

#: Tokens in the sample of a group. The experts of a layer divide that number, each has the least.
SAMPLE = 2048
_LEAST_OF_EXPERT = 64
#: Rows of an expert that a CPU holds back: each of many experts gets few rows at a time.
_PATIENCE_OF_EXPERT = 512

#: Inputs in the float model by module path, and the tokens that they are of (None: all tokens).
FloatInputs: TypeAlias = dict[str, "tuple[Tensor, Tensor | None]"]


@dataclass(frozen=True)
class SampleQuota:
    """How the tokens of a sample are divided among batches and processes.

    ``batches``: the number of batches of each process; ``rank``: this process.
    """

    batches: Sequence[int]
    rank: int

    def of_sample(self, count: int) -> tuple[int, int]:
        """Rows that each batch gives to a sample of ``count``, and the most from this process."""
        per_batch = -(-count // sum(self.batches))
        return per_batch, max(0, count - per_batch * sum(self.batches[: self.rank]))


@dataclass(frozen=True)
class Seen:
    """The tokens of a batch: windows of ``length``.

    ``real`` and ``counted``, bool ``[windows, length]``, are false for padding, and for padding and
    all other tokens that sums leave out; None if there are none.
    """

    length: int
    real: Tensor | None
    counted: Tensor | None


class Observation:
    """Gathers ``statistics`` of the input groups of one block, by the path of a reading module.

    A group is observed where its whole tensor is read, and at the first linear of each expert that
    reads some of its tokens.
    """

    def __init__(
        self,
        block: nn.Module,
        structure: Sequence[GroupPaths],
        schemes: Mapping[str, Scheme],
        quota: SampleQuota,
        device: torch.device,
        *,
        with_drift: bool,
        all_experts: bool = False,
    ) -> None:
        """``schemes``: the scheme of each quantized linear, by path within the block."""
        self._block, self._all_experts = block, all_experts
        self._rows_per_batch: dict[str, int] = {}
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
            of_experts = [linears[0] for linears in group.by_expert]
            if group.experts is None:
                self._rows_per_batch[group.at], room = quota.of_sample(SAMPLE)
                self.statistics[group.at] = start(room)
                count = max(_LEAST_OF_EXPERT, SAMPLE // max(1, len(of_experts)))
            else:
                of_experts = [group.at]
                experts = len([*block.get_submodule(group.experts).children()])
                count = max(_LEAST_OF_EXPERT, SAMPLE // experts)
            for path in of_experts:
                self._rows_per_batch[path], _ = quota.of_sample(count)
                # A process may see all tokens of an expert, or none.
                self.statistics[path] = start(count, patience=_PATIENCE_OF_EXPERT)

    @contextmanager
    def recording_float(self, inputs: FloatInputs) -> Iterator[None]:
        """Within it, a pass of the float block puts what its linears read into ``inputs``."""

        def keep(path: str, x: Tensor) -> None:
            inputs[path] = x, rows_of(self._block, path)

        with self._seeing(keep):
            yield

    @contextmanager
    def gathering(self, seen: Seen, float_inputs: FloatInputs, *, stop: bool) -> Iterator[None]:
        """Within it, a pass of the block over ``seen`` adds what linears read to the statistics.

        ``float_inputs`` as ``recording_float`` left them. ``stop`` ends the pass once all inputs
        have been seen.
        """

        def observe(path: str, x: Tensor) -> None:
            rows = rows_of(self._block, path)
            float_x, float_rows = float_inputs.get(path, (None, None))
            self.statistics[path].observe_windows(
                x,
                self._rows_per_batch[path],
                seen.length,
                seen.real,
                float_x,
                rows,
                float_rows,
                counted=seen.counted,
            )

        try:
            with self._seeing(observe, stop=stop):
                yield
        except _SeenEnoughError as enough:
            # A reference to this exception would keep all tensors of the pass alive. From Python
            # 3.12 on its traceback also holds this frame, which holds the exception.
            traceback.clear_frames(enough.__traceback__)
            enough.__traceback__ = None

    def share(self, processes: Processes) -> None:
        """Merges the statistics of all ``processes``; afterwards each process has the same."""
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
        with hooked(handles), seeing_all(self._block) if self._all_experts else nullcontext():
            yield


class _SeenEnoughError(Exception):
    """Ends a forward pass whose output is not used, once all inputs have been observed."""
