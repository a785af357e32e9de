"""Tell the plugins that watch a run how it goes on. One that breaks is warned of, and told no more.

A plugin that only looks on must not cost anyone a run of hours.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping

from qplug.api import Block, QuantizedWeight
from qplug.api.events import BlockReport, Result
from qplug.errors import PluginWarning
from qplug.output.step_report import Report
from qplug.registry.registry import Registry


class Announcer:
    """Tells of one run that has ``count`` steps, ``done`` of which an earlier run finished."""

    def __init__(
        self, registry: Registry, count: int, done: int = 0, *, silent: bool = False
    ) -> None:
        """``silent``: tell nobody; of several processes one tells."""
        self._registry, self._count, self._done = registry, count, done
        self._silent = silent
        self._broken: set[str] = set()
        self._since = time.monotonic()

    def block_done(
        self,
        name: str,
        report: Report,
        block: Block | None = None,
        codes: Mapping[str, QuantizedWeight] | None = None,
    ) -> None:
        """Tell of a finished step."""
        self._done += 1
        told = BlockReport(
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
        self._tell("qplug_block_done", report=told)
        self._since = time.monotonic()

    def run_done(self, result: Result) -> None:
        """Tell of the whole run, when its folder is there."""
        self._tell("qplug_run_done", result=result)

    def _tell(self, hook: str, **event: object) -> None:
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
