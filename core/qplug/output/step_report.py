"""The report on one step of a run, as the journal and qplug.json store it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qplug.calibration.ranges import InputRange


@dataclass(frozen=True)
class Report:
    """The result of a step, in numbers.

    ``errors`` are ``||W' - W|| / ||W||`` by linear, where ``W'`` is the dequantized weight.
    ``losses`` are the relative errors of the linears' outputs on calibration data, by linear.
    ``rewritten`` are the names of tensors whose float values an algorithm changed. ``notes`` are
    messages of algorithms to the user. ``inputs`` are the ranges of the linears' inputs, before and
    after all transforms, by linear. ``clips`` are the ``clip_counts`` of linears with clipped
    scales.
    """

    errors: Mapping[str, float] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)
    rewritten: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    inputs: Mapping[str, tuple[InputRange, InputRange]] = field(default_factory=dict)
    clips: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def loss(self) -> float | None:
        """The mean of ``losses``; None if they are empty."""
        return sum(self.losses.values()) / len(self.losses) if self.losses else None

    def to_dict(self) -> dict[str, Any]:
        """Returns a mapping for JSON, which ``from_dict`` reads."""
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
        """Returns the report that ``to_dict`` wrote as ``plain``."""
        read = InputRange.from_list
        return cls(
            errors=plain["errors"],
            losses=plain["losses"],
            rewritten=tuple(plain["rewritten"]),
            notes=tuple(plain["notes"]),
            inputs={n: (read(old), read(new)) for n, (old, new) in plain["inputs"].items()},
            clips={name: tuple(counts) for name, counts in plain["clips"].items()},
        )
