"""A finished step as the journal of a run lists it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qplug.output.plan import Plan
from qplug.output.step_report import Report

if TYPE_CHECKING:
    from typing import TypeGuard


@dataclass(frozen=True)
class Entry:
    """A finished step in the journal: the checksums of its tensors, in order, and its report.

    ``source`` is the checksum of the float tensors that the step depends on.
    """

    step: int
    crcs: tuple[int, ...]
    source: int
    report: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns a mapping for JSON, which ``read`` reads."""
        return {
            "step": self.step,
            "crcs": list(self.crcs),
            "source": self.source,
            "report": self.report,
        }

    @classmethod
    def read(cls, plain: Mapping[str, Any], plan: Plan) -> Entry | None:
        """Returns the entry that ``to_dict`` wrote as ``plain``; None if it is no step of ``plan``.

        An entry whose line has the right checksum is in order. This also finds those that nobody
        wrote by accident.
        """
        number, crcs, source = plain.get("step"), plain.get("crcs"), plain.get("source")
        if not (_is_number(number) and _is_number(source) and number < len(plan.steps)):
            return None
        outputs = plan.steps[number].outputs
        if not (isinstance(crcs, list) and len(crcs) == len(outputs)):
            return None
        if not all(_is_number(crc) for crc in crcs):
            return None
        report = plain.get("report")
        if not Report.is_of(report, plan.steps[number].linears):
            return None
        return cls(number, tuple(crcs), source, report)


def _is_number(value: object) -> TypeGuard[int]:
    return type(value) is int and value >= 0
