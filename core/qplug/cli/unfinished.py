"""Says what is kept of a run that Ctrl-C ends, and what a run found that goes on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qplug.api.events import Result, RunStart
from qplug.api.hookspecs import hookimpl
from qplug.cli.printing import note


def kept(start: RunStart, steps: int) -> str:
    """Returns in words how much of a run ``steps`` finished steps are: "12 of 80 blocks"."""
    if blocks := start.blocks_after(steps):
        return f"{blocks} of {start.blocks} blocks"
    return f"{steps} of {start.count} steps"


def tell_found(start: RunStart) -> None:
    """Prints what a run found of an earlier run that was stopped, if it found anything."""
    if start.done:
        note(f"going on: {kept(start, start.done)} were kept from an earlier run")


class Unfinished:
    """A plugin that prints on stderr what is kept of a run that does not come to its end."""

    def __init__(self, out: Path | None) -> None:
        """``out`` is the folder that the run writes; None if a recipe names it."""
        self._start = None if out is None else RunStart(out, 0, 0)
        self._has_finished = self._is_checking = False
        self._finished = Path()

    @hookimpl
    def qplug_run_begun(self, start: RunStart) -> None:
        self._start = start

    @hookimpl
    def qplug_run_done(self, result: Result) -> None:
        self._start, self._has_finished = None, True
        self._finished = result.out

    @hookimpl
    def qplug_stage_begun(self, stage: str) -> None:
        self._is_checking = stage == "checking"

    def tell_kept(self) -> None:
        """Prints what Ctrl-C leaves on disk, and how to go on."""
        from qplug.output.unfinished import kept_steps

        start = self._start
        steps = 0 if start is None else kept_steps(start.out)
        if start is not None and steps:
            what = kept(start, steps) if start.count else f"{steps} steps"
            note(f"{start.out}: {what} are kept; the same command goes on after them.")
        elif self._is_checking:
            note(f"{self._finished}: is complete; its quality was not measured.")
        elif self._has_finished:
            note("The finished folders are kept; the same command goes on after them.")
        else:
            note("No step was finished; the same command starts again.")


@contextmanager
def telling_kept(out: Path | None) -> Iterator[Unfinished]:
    """A context that says after Ctrl-C what is kept of the run that writes ``out``.

    The context gives a plugin that the run must have; ``out`` is None if a recipe names the folder.
    """
    unfinished = Unfinished(out)
    try:
        yield unfinished
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            note("")  # the terminal shows ^C on the line
        unfinished.tell_kept()
        raise
