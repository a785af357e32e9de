"""What a step of a run reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qplug.calibration.ranges import InputRange


@dataclass(frozen=True)
class Report:
    """What became of a step.

    ``errors``: ``||W' - W|| / ||W||`` by linear; ``losses``: the same of its output on calibration
    data. ``rewritten``: the tensors that no longer hold what the float model has, codes aside.
    ``notes``: what algorithms have to tell the user. ``inputs``: what linears read before and after
    all transforms; ``clips``: the ``clip_counts`` of linears that have clipped scales.
    """

    errors: Mapping[str, float] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)
    rewritten: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    inputs: Mapping[str, tuple[InputRange, InputRange]] = field(default_factory=dict)
    clips: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def loss(self) -> float | None:
        """The mean of ``losses``."""
        return sum(self.losses.values()) / len(self.losses) if self.losses else None

    def to_dict(self) -> dict[str, Any]:
        """A plain form for JSON."""
        return {
            "errors": dict(self.errors),
            "losses": dict(self.losses),
            "rewritten": list(self.rewritten),
            "notes": list(self.notes),
            "inputs": {n: [r.to_list() for r in both] for n, both in self.inputs.items()},
            "clips": {name: list(counts) for name, counts in self.clips.items()},
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Report:
        """The inverse of ``to_dict``."""
        read = InputRange.from_list
        return cls(
            errors=plain["errors"],
            losses=plain["losses"],
            rewritten=tuple(plain["rewritten"]),
            notes=tuple(plain["notes"]),
            inputs={n: (read(old), read(new)) for n, (old, new) in plain["inputs"].items()},
            clips={name: tuple(counts) for name, counts in plain["clips"].items()},
        )
