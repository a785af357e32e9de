"""Progress on stderr, so that stdout holds results alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Takes how many are done, how many there are, what was done last, and its loss.
Bar = Callable[[int, int, str, "float | None"], None]


@contextmanager
def progress_bar(what: str) -> Iterator[Bar]:
    """A bar with the time left, gone when it is done; nothing where stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeLeft())
    console = Console(stderr=True)
    off = not console.is_interactive  # rich would print an empty line
    with Progress(*columns, console=console, transient=True, disable=off) as progress:
        task = progress.add_task(what, total=None)

        def show(done: int, total: int, name: str, loss: float | None) -> None:
            told = f"{what} {name}" + ("" if loss is None else f" (loss {loss:.4f})")
            progress.update(task, completed=done, total=total, description=told.strip())

        yield show
