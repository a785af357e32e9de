"""Says what is kept of a run that Ctrl-C ends, and what a run found that goes on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qplug.api.events import Result, RunStart
from qplug.api.hookspecs import hookimpl
from qplug.cli.printing import note


class Unfinished:
    """A plugin that prints on stderr what a run goes on with, and what is kept of it."""

    def __init__(self, out: Path | None) -> None:
        """``out`` is the folder that the run writes; None if a recipe names it."""
        self._start = None if out is None else RunStart(out, 0, 0)
        self._has_finished = False

    @hookimpl
    def qplug_run_begun(self, start: RunStart) -> None:
        self._start = start
        if start.done:
            note(f"{start.out}: goes on after {start.done} of {start.count} steps")

    @hookimpl
    def qplug_run_done(self, result: Result) -> None:
        self._start, self._has_finished = None, True

    def tell_kept(self) -> None:
        """Prints what Ctrl-C leaves on disk, and how to go on."""
        from qplug.output.unfinished import kept_steps

        start = self._start
        kept = 0 if start is None else kept_steps(start.out)
        if start is not None and kept:
            steps = f"{kept} of {start.count} steps" if start.count else f"{kept} steps"
            note(f"{start.out}: {steps} are kept; the same command goes on after them.")
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
