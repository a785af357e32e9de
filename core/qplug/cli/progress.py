"""Shows progress on stderr, so that stdout has nothing but results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qplug.api.hookspecs import hookimpl
from qplug.cli.unfinished import tell_found
from qplug.errors import shown

if TYPE_CHECKING:
    from rich.progress import Progress

    from qplug.api.events import BlockReport, RunStart


class Bar:
    """A progress bar on the terminal. It is also a plugin, which shows the progress of a run."""

    def __init__(self, what: str, progress: Progress) -> None:
        self._what, self._progress = what, progress
        self._task = progress.add_task(shown(what), total=None)

    def __call__(self, done: int, total: int, name: str, loss: float | None) -> None:
        """Shows that ``done`` of ``total`` steps are done, and the last one's name and loss."""
        text = f"{self._what} {name}" + ("" if loss is None else f" (loss {loss:.4f})")
        self._progress.update(
            self._task, completed=done, total=total, description=shown(text.strip())
        )

    @hookimpl
    def qplug_run_begun(self, start: RunStart) -> None:
        self._progress.update(self._task, completed=start.done, total=start.count)
        tell_found(start)

    @hookimpl
    def qplug_block_done(self, report: BlockReport) -> None:
        self(report.number, report.count, report.name, report.loss)


@contextmanager
def progress_bar(what: str) -> Iterator[Bar]:
    """A context with a progress bar that shows the time left and disappears at the end.

    ``what`` is the text before the bar. Nothing is shown if stderr is not a terminal.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeLeft(),
    )
    console = Console(stderr=True)
    off = not console.is_interactive  # rich would print an empty line
    with Progress(*columns, console=console, transient=True, disable=off) as progress:
        yield Bar(what, progress)
