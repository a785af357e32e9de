"""``qplug eval --behaviour``: runs the suite, and prints a table of counts."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from qplug.cli.printed_table import print_table
from qplug.cli.printing import note, say_json
from qplug.cli.progress import progress_bar
from qplug.registry.registry import Registry

if TYPE_CHECKING:
    from qplug.evaluation.behaviour.observe import Behaviour
    from qplug.evaluation.behaviour.suite import Part


def watch_behaviour(
    model: str,
    registry: Registry,
    *,
    base: str | None,
    tokens: int,
    device: str,
    trust_remote_code: bool,
) -> Behaviour:
    """Returns the behaviour of ``model`` and of ``base``, and shows progress.

    Raises QplugError as ``observe`` does.
    """
    from qplug.evaluation.behaviour.observe import observe

    with progress_bar("behaviour") as bar:
        return observe(
            model,
            base=base,
            tokens=tokens,
            device=device,
            trust_remote_code=trust_remote_code,
            registry=registry,
            watch=lambda name, done, count, part: bar(done, count, f"{name}: {part}", None),
        )


def print_behaviour(behaviour: Behaviour, *, as_json: bool) -> None:
    """Prints the counts of ``behaviour`` as a table, or as JSON; failures follow on stderr."""
    if as_json:
        say_json(dataclasses.asdict(behaviour))
        return
    base = behaviour.base_parts
    columns = ["part", "base", "quantized"] if base else ["part", "passed"]
    rows = [[part.name, _count(part)] for part in behaviour.parts]
    if base:
        pairs = zip(base, behaviour.parts, strict=True)
        rows = [[part.name, _count(other), _count(part)] for other, part in pairs]
    print_table([columns, *rows])
    for part in behaviour.parts:
        if part.absent:
            note(f"{part.name}: does not apply: {part.absent}")
        for failure in part.failures:
            note(f"{part.name}: {failure}")


def _count(part: Part) -> str:
    return "-" if part.absent else f"{part.passed} of {part.count}"
