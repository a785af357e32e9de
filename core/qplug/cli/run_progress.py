"""Shows a run of ``qplug quantize`` from its first second on: stages, then blocks and time left.

On a terminal a bar counts the decoder blocks. Elsewhere a few plain lines say the same, at most one
line in ``_SECONDS`` seconds about blocks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qplug.api.hookspecs import hookimpl
from qplug.cli.plan_text import data_warning, duration, plan_paragraph
from qplug.cli.printing import note, warn
from qplug.cli.unfinished import tell_found
from qplug.errors import shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.progress import Progress

    from qplug.api.events import BlockReport, RunStart

#: Between two lines about blocks, where stderr is no terminal.
_SECONDS = 30.0
#: Stages that may take long and that come once: a plain line names them.
_NAMED = ("learning", "checking")


class Blocks:
    """The decoder blocks of one run: how many are done, and the time that the others take."""

    def __init__(self, start: RunStart, now: float) -> None:
        self._start = start
        plan = start.plan
        known = plan.block_seconds if plan is not None else ()
        self.are_estimated = len(known) == start.blocks > 0
        self._seconds = known if self.are_estimated else (1.0,) * start.blocks
        self._began = self._since = now
        self._first = self.done = start.blocks_after(start.done)

    @property
    def count(self) -> int:
        """The number of all blocks."""
        return self._start.blocks

    def finish(self, steps: int, now: float) -> bool:
        """Notes that ``steps`` steps are finished; returns whether a block is complete by that."""
        done = self._start.blocks_after(steps)
        is_new = done > self.done
        if is_new:
            self.done, self._since = done, now
        return is_new

    def left(self, now: float) -> float | None:
        """Returns the seconds that the other blocks take; None if there is nothing to say.

        The blocks that are done correct the estimate of the others.
        """
        computed = sum(self._seconds[self._first : self.done])
        if computed > 0:
            factor = (self._since - self._began) / computed
        elif self.are_estimated:
            factor = 1.0
        else:
            return None
        left = factor * sum(self._seconds[self.done :]) - (now - self._since)
        return left if left > 0 else None


class RunProgress:
    """A plugin that shows the stages and the blocks of a run on stderr."""

    def __init__(self, progress: Progress | None, opening: str) -> None:
        """``progress`` is the bar of a terminal, None elsewhere; ``opening`` is the first line."""
        self._progress = progress
        self._blocks: Blocks | None = None
        self._loss: float | None = None
        self._said = time.monotonic()
        #: The starts of all runs so far, by folder.
        self.starts: dict[Path, RunStart] = {}
        if progress is None:
            note(opening)
        else:
            self._task = progress.add_task(shown(opening), total=None, left="")

    @hookimpl
    def qplug_stage_begun(self, stage: str) -> None:
        self.stage(stage)

    def stage(self, name: str) -> None:
        """Shows that the run enters the stage ``name``."""
        if self._progress is None:
            if name.partition(" ")[0] in _NAMED:
                note(name)
        elif name == "blocks" and self._blocks is not None:
            self._show(self._blocks)
        else:
            self._blocks = None if name in ("opening", "writing") else self._blocks
            self._progress.reset(self._task, total=None, description=shown(name))

    @hookimpl
    def qplug_run_begun(self, start: RunStart) -> None:
        self.starts[start.out] = start
        self._said = time.monotonic()
        self._blocks = Blocks(start, self._said)
        if start.plan is not None:
            note(plan_paragraph(start.plan))
            if warning := data_warning(start.plan):
                warn(warning)
        tell_found(start)

    @hookimpl
    def qplug_block_done(self, report: BlockReport) -> None:
        blocks, now = self._blocks, time.monotonic()
        if report.loss is not None:
            self._loss = report.loss
        if blocks is None or not blocks.finish(report.number, now):
            return
        if self._progress is not None:
            self._show(blocks)
        elif now - self._said >= _SECONDS and blocks.done < blocks.count:
            self._said = now
            left = blocks.left(now)
            rest = "" if left is None else f", about {duration(left)} left"
            note(f"block {blocks.done} of {blocks.count} is done{self._of_loss()}{rest}")

    def measured(self, what: str, done: int, total: int) -> None:
        """Shows that ``done`` of ``total`` windows are measured; ``what`` says of which model."""
        if self._progress is not None:
            self._progress.update(
                self._task, completed=done, total=total, description=shown(what.strip())
            )

    def time_left(self) -> str:
        """Returns the time left in words; "" if it is not known."""
        left = None if self._blocks is None else self._blocks.left(time.monotonic())
        return "" if left is None or left < 1 else f"about {duration(round(left))} left"

    def _of_loss(self) -> str:
        return "" if self._loss is None else f" (loss {self._loss:.4f})"

    def _show(self, blocks: Blocks) -> None:
        assert self._progress is not None
        number = min(blocks.done + 1, blocks.count)
        after = f"{self._of_loss()[:-1]} before)" if self._of_loss() else ""
        self._progress.update(
            self._task,
            completed=blocks.done,
            total=blocks.count,
            description=shown(f"block {number} of {blocks.count}{after}"),
        )


@contextmanager
def run_progress(opening: str) -> Iterator[RunProgress]:
    """A context with the plugin that shows a run; the first thing that is shown is ``opening``."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_interactive:
        yield RunProgress(None, opening)
        return
    from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
    from rich.text import Text

    class TimeLeft(ProgressColumn):
        """The time left, which the blocks know."""

        def __init__(self, left: Callable[[], str]) -> None:
            super().__init__()
            self._left = left

        def render(self, task: Task) -> Text:
            return Text(self._left() if task.total else "", style="progress.remaining")

    shows: list[RunProgress] = []
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeLeft(lambda: shows[0].time_left() if shows else ""),
        console=console,
        transient=True,
    ) as progress:
        shows.append(RunProgress(progress, opening))
        yield shows[0]
