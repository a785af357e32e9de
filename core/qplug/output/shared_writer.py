"""The folder of a run of several processes: the first one has it, the others look through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from qplug.machine.processes import Processes
from qplug.output.writer import Content, Writer

if TYPE_CHECKING:
    from torch import Tensor


class SharedWriter:
    """An ``Writer`` that the first process opens, and that the others know from what it tells."""

    def __init__(self, processes: Processes, make: Callable[[], Writer]) -> None:
        self._processes = processes
        self._output = make() if processes.is_first else None

    def __enter__(self) -> SharedWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._output is not None:
            self._output.__exit__(kind, error, trace)

    def finished(self) -> dict[int, dict[str, Any]]:
        """The steps that earlier runs wrote, with their reports. All processes must ask."""
        return self._processes.from_first(lambda: self._mine().finished)

    def stored(self, modules: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """``Writer.stored`` of each module, by name. All processes must ask."""
        return self._processes.from_first(
            lambda: {module: self._mine().stored(module) for module in modules}
        )

    def cached(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """``Writer.cached``. All processes must ask."""
        return self._processes.from_first(lambda: self._mine().cached(name, make))

    def write(self, number: int, contents: Mapping[str, Content], report: dict[str, Any]) -> None:
        """``Writer.write`` on the first process; no other asks for the contents."""
        if self._output is not None:
            self._output.write(number, contents, report)

    def finish(
        self,
        companions: Iterable[Path],
        texts: Mapping[str, str],
        convert: Callable[[Path], None] | None = None,
    ) -> None:
        """``Writer.finish`` on the first process."""
        if self._output is not None:
            self._output.finish(companions, texts, convert)

    def _mine(self) -> Writer:
        assert self._output is not None
        return self._output
