"""The report on one step of a run, as the journal and qplug.json store it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from qplug.calibration.ranges import InputRange

if TYPE_CHECKING:
    from typing import TypeGuard

T = TypeVar("T")


@dataclass(frozen=True)
class Report:
    """The result of a step, in numbers.

    ``errors`` are ``||W' - W|| / ||W||`` by linear, where ``W'`` is the dequantized weight.
    ``losses`` are the relative errors of the linears' outputs on calibration data, by linear.
    ``rewritten`` are the names of tensors whose float values an algorithm changed. ``notes`` are
    messages of algorithms to the user. ``inputs`` are the ranges of the linears' inputs, before and
    after all transforms, by linear. ``clips`` are the ``clip_counts`` of linears with clipped
    scales. ``experts`` are the numbers of tokens in the statistics of each expert, by layer.
    """

    errors: Mapping[str, float] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)
    rewritten: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    inputs: Mapping[str, tuple[InputRange, InputRange]] = field(default_factory=dict)
    clips: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    experts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Sequence[Report]) -> Report:
        """Returns the report of a step of which ``parts`` are the reports of its parts."""
        if len(parts) == 1:
            return parts[0]
        experts: dict[str, tuple[int, ...]] = {}
        for part in parts:
            for layer, counts in part.experts.items():
                experts[layer] = (*experts.get(layer, ()), *counts)
        return cls(
            errors=_merged([part.errors for part in parts]),
            losses=_merged([part.losses for part in parts]),
            rewritten=tuple(sorted(name for part in parts for name in part.rewritten)),
            notes=tuple(note for part in parts for note in part.notes),
            inputs=_merged([part.inputs for part in parts]),
            clips=_merged([part.clips for part in parts]),
            experts=experts,
        )

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
            "experts": {name: list(counts) for name, counts in self.experts.items()},
        }

    @staticmethod
    def is_of(plain: object, linears: Collection[str]) -> TypeGuard[dict[str, Any]]:
        """Whether ``plain`` may be the report of a step that quantizes ``linears``.

        Text is text, and numbers are numbers.
        """
        if not (isinstance(plain, dict) and plain.keys() == Report().to_dict().keys()):
            return False
        names = ("errors", "losses", "inputs", "clips", "experts")
        errors, losses, inputs, clips, experts = (plain[name] for name in names)
        return (
            all(isinstance(each, dict) for each in (errors, losses, inputs, clips, experts))
            and errors.keys() >= {*linears}
            and _are([*errors.values(), *losses.values()], int, float)
            and all(_are(ranges, list) and len(ranges) == 2 for ranges in inputs.values())
            and all(_are(r, int, float) and len(r) == 3 for both in inputs.values() for r in both)
            and all(_are(counts, int) for counts in [*clips.values(), *experts.values()])
            and _are(plain["rewritten"], str)
            and _are(plain["notes"], str)
        )

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
            experts={name: tuple(counts) for name, counts in plain["experts"].items()},
        )


def _merged(parts: Sequence[Mapping[str, T]]) -> dict[str, T]:
    return {name: value for part in parts for name, value in part.items()}


def _are(values: object, *kinds: type) -> TypeGuard[list[Any]]:
    """Whether ``values`` is a list of values of ``kinds``, not of kinds derived from these."""
    return isinstance(values, list) and all(type(value) in kinds for value in values)
