"""Call those who watch a run. A plugin that breaks is named in a warning, and not called again.

A plugin that only looks on must not cost anyone a run of hours.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping

from qplug.api import Block, QuantizedWeight
from qplug.api.events import BlockReport, Result
from qplug.errors import PluginWarning
from qplug.machine.session import Session
from qplug.output.step_report import Report

#: Called for each written step: its number from 1, the number of steps, its name, and the mean loss
#: of its linears if it was calibrated.
Watcher = Callable[[int, int, str, "float | None"], None]


class Watchers:
    """Those who watch one run: plugins through hooks, and the caller through ``watch``.

    Of several processes the first alone calls them.
    """

    def __init__(
        self, session: Session, count: int, done: int, watch: Watcher = lambda *_: None
    ) -> None:
        """The run has ``count`` steps, ``done`` of which an earlier run finished."""
        self._registry, self._count, self._done = session.registry, count, done
        self._written, self._watch = done, watch
        self._silent = not session.processes.is_first
        self._broken: set[str] = set()
        self._since = time.monotonic()

    def block_done(
        self,
        name: str,
        report: Report,
        block: Block | None = None,
        codes: Mapping[str, QuantizedWeight] | None = None,
    ) -> None:
        """Call ``qplug_block_done`` for a step that is computed, and not yet written."""
        self._done += 1
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
        """Call the caller's ``watch`` for a step whose tensors are on their way to the disk."""
        self._written += 1
        if not self._silent:
            self._watch(self._written, self._count, name, report.loss)

    def run_done(self, result: Result) -> None:
        """Call ``qplug_run_done``, when the folder of the run is there."""
        self._call("qplug_run_done", result=result)

    def _call(self, hook: str, **event: object) -> None:
        for plugin, call in self._registry.implementing(hook) if not self._silent else ():
            if plugin.name in self._broken:
                continue
            try:
                call(**event)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # anything at all, also the SystemExit of a script
                self._broken.add(plugin.name)
                reason = f"{type(error).__name__}: {error}"
                sentence = f"plugin {plugin}: {hook}: {reason}; it is told nothing more"
                warnings.warn(sentence, PluginWarning, stacklevel=2)
