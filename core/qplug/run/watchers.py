"""Calls the plugins that watch a run; one that fails gets a warning and is not called again.

A failure of a plugin that only watches must not stop a run of hours.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping

from qplug.api import Block, QuantizedWeight
from qplug.api.events import BlockReport, Result, RunStart
from qplug.errors import PluginWarning, reason
from qplug.machine.session import Session
from qplug.output.step_report import Report
from qplug.registry.border import is_ctrl_c

#: A function that is called for each written step with its number from 1, the number of all steps,
#: its name, and the mean loss of its linears, None without calibration data.
Watcher = Callable[[int, int, str, "float | None"], None]


class Watchers:
    """The watchers of one run: plugins with hooks, and the caller's function ``watch``.

    Only the first of several processes calls them.
    """

    def __init__(self, session: Session, watch: Watcher = lambda *_: None) -> None:
        self._registry, self._watch = session.registry, watch
        self._count = self._done = self._written = 0
        self._silent = not session.processes.is_first
        self._broken: set[str] = set()
        self._since = time.monotonic()

    def stage_begun(self, stage: str) -> None:
        """Calls ``qplug_stage_begun``: the run enters ``stage``."""
        self._call("qplug_stage_begun", stage=stage)

    def run_begun(self, start: RunStart) -> None:
        """Calls ``qplug_run_begun``, before the first step of the run that ``start`` describes."""
        self._count, self._done, self._written = start.count, start.done, start.done
        self._call("qplug_run_begun", start=start)
        self._since = time.monotonic()

    def block_done(
        self,
        name: str,
        report: Report,
        block: Block | None = None,
        codes: Mapping[str, QuantizedWeight] | None = None,
        *,
        again: bool = False,
    ) -> None:
        """Calls ``qplug_block_done`` for a step that is computed and not yet written.

        ``block`` and ``codes`` are None for a step that only copies tensors. ``again``: the
        step was reported already, under other schemes.
        """
        self._done += 0 if again else 1
        event = BlockReport(
            name=name,
            number=self._done,
            count=self._count,
            errors=report.errors,
            losses=report.losses,
            notes=report.notes,
            seconds=time.monotonic() - self._since,
            block=block,
            codes=codes or {},
        )
        self._call("qplug_block_done", report=event)
        self._since = time.monotonic()

    def step_written(self, name: str, report: Report) -> None:
        """Calls ``watch`` for a step whose tensors are queued for writing."""
        self._written += 1
        if not self._silent:
            self._watch(self._written, self._count, name, report.loss)

    def run_done(self, result: Result) -> None:
        """Calls ``qplug_run_done``, after the folder of the run is complete."""
        self._call("qplug_run_done", result=result)

    def _call(self, hook: str, **event: object) -> None:
        for plugin, call in self._registry.implementing(hook) if not self._silent else ():
            if plugin.name in self._broken:
                continue
            try:
                call(**event)
            except BaseException as error:  # a plugin may raise anything, a script even SystemExit
                if is_ctrl_c(error):
                    raise
                self._broken.add(plugin.name)
                why = reason(error)
                sentence = f"plugin {plugin}: {hook}: {why}; it no longer watches this run"
                warnings.warn(sentence, PluginWarning, stacklevel=2)
