"""Gives all processes of a run access to the folder that the first process writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from qplug.api.events import RaisedBlock
from qplug.machine.processes import Processes
from qplug.output.writer import Content, Writer

if TYPE_CHECKING:
    from torch import Tensor


class SharedWriter:
    """The ``Writer`` of a run. The first process opens it; the others receive what it returns."""

    def __init__(self, processes: Processes, make: Callable[[], Writer]) -> None:
        self._processes = processes
        self._writer = make() if processes.is_first else None

    def __enter__(self) -> SharedWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.__exit__(kind, error, trace)

    def finished(self) -> dict[int, dict[str, Any]]:
        """Returns the reports of the steps that earlier runs wrote, by number.

        All processes must call this together.
        """
        return self._processes.from_first(lambda: self._of_first().finished)

    def raised(self) -> tuple[RaisedBlock, ...]:
        """Returns the blocks that earlier runs raised.

        All processes must call this together.
        """
        return self._processes.from_first(lambda: self._of_first().raised)

    def raise_block(self, block: RaisedBlock) -> None:
        """Calls ``Writer.raise_block`` in the first process."""
        if self._writer is not None:
            self._writer.raise_block(block)

    def stored(self, modules: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """Returns ``Writer.stored`` of each module, by name.

        All processes must call this together.
        """
        return self._processes.from_first(
            lambda: {module: self._of_first().stored(module) for module in modules}
        )

    def cached(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Returns ``Writer.cached``, which calls ``make`` in the first process.

        All processes must call this together.
        """
        return self._processes.from_first(lambda: self._of_first().cached(name, make))

    def write(
        self,
        number: int,
        contents: Mapping[str, Content],
        report: dict[str, Any],
    ) -> None:
        """Calls ``Writer.write`` in the first process; the others do not read ``contents``."""
        if self._writer is not None:
            self._writer.write(number, contents, report)

    def finish(
        self,
        texts: Mapping[str, str],
        record: Mapping[str, Any],
        convert: Callable[[Path], None] | None = None,
    ) -> None:
        """Calls ``Writer.finish`` in the first process."""
        if self._writer is not None:
            self._writer.finish(texts, record, convert)

    def _of_first(self) -> Writer:
        assert self._writer is not None
        return self._writer
