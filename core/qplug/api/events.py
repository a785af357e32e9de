"""What plugins that watch a run are told: of each finished step, and of the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qplug.api import Block, QuantizedWeight


@dataclass(frozen=True)
class BlockReport:
    """What became of a step of a run: a decoder block, or one tensor of a data-free run.

    ``number`` counts finished steps from 1 on, those of an earlier run that was stopped included;
    ``count`` is how many there are. ``errors``: ``||W' - W|| / ||W||`` by linear; ``losses``: the
    same of its output on calibration data. ``notes``: what algorithms have to tell the user.
    ``seconds``: since the step before was finished.

    ``block`` is the block after all transforms, float32 in a calibrated run, with the statistics of
    its input groups; ``codes`` are by linear, as they go to the exporter. Both are freed when the
    hook returns: keep numbers, not tensors, and change nothing. ``block`` is None, and ``codes``
    are empty, for what is only copied.
    """

    name: str
    number: int
    count: int
    errors: Mapping[str, float] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    block: Block | None = field(default=None, repr=False)
    codes: Mapping[str, QuantizedWeight] = field(default_factory=dict, repr=False)

    @property
    def loss(self) -> float | None:
        """The mean of ``losses``; None if there are none."""
        return sum(self.losses.values()) / len(self.losses) if self.losses else None


@dataclass(frozen=True)
class StageCost:
    """A stage's seconds without those of stages within it, and bytes of memory at its peak.

    ``memory`` is what the process had resident, ``gpu_memory`` what torch had allocated on the
    GPU, stages within it included; None where that cannot be told. A peak is seen if nothing before
    it was higher; else ``memory`` is the most that was held as the stage began or ended.
    """

    name: str
    seconds: float
    memory: int | None
    gpu_memory: int | None


@dataclass(frozen=True)
class Result:
    """What a run did. ``errors`` are ``||W' - W|| / ||W||`` of each quantized linear.

    ``losses`` are the same of what the linears compute on the calibration data, if there is any;
    ``notes`` is what algorithms have to tell. ``resumed``: steps that an earlier run had finished.
    ``stages``: what each stage cost; of several processes, the first one.
    """

    out: Path
    errors: Mapping[str, float]
    losses: Mapping[str, float]
    notes: tuple[str, ...]
    source_bytes: int
    bytes: int
    seconds: float
    resumed: int
    dry_run: bool = False
    stages: tuple[StageCost, ...] = ()
