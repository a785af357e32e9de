"""Tries tiny models in processes of their own: forks, each with a limit of time."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]
#: Adds what it finds of the model of a name to the record; it works in the folder.
Work = Callable[[str, Path, Callable[[str, Any], None]], None]


@dataclass(frozen=True)
class _Child:
    name: str
    folder: tempfile.TemporaryDirectory[str]
    began: float

    @property
    def told(self) -> Path:
        return Path(self.folder.name) / "told.jsonl"


def in_forks(
    names: Sequence[str], work: Work, *, jobs: int, seconds: float
) -> Iterator[tuple[str, Record]]:
    """Yields the record of each of ``names`` when its fork has ended.

    ``seconds``: the time for one name. A fork that takes longer, or that a signal ends, leaves
    what it has found, and ``"ended"`` in its record says how it ended.
    """
    waiting, children = list(names), dict[int, _Child]()
    try:
        while waiting or children:
            while waiting and len(children) < jobs:
                child = _Child(waiting.pop(0), tempfile.TemporaryDirectory(), time.monotonic())
                pid = os.fork()
                if pid == 0:
                    _work(child, work)
                children[pid] = child
            time.sleep(0.05)
            for pid, child in list(children.items()):
                late = time.monotonic() - child.began > seconds
                if late:
                    os.kill(pid, signal.SIGKILL)
                done, status = os.waitpid(pid, 0 if late else os.WNOHANG)
                if done:
                    del children[pid]
                    yield child.name, _record(child, status, late=late)
                    child.folder.cleanup()
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _work(child: _Child, work: Work) -> None:
    """Works in a fork, and ends it."""
    log = Path(child.folder.name) / "log.txt"
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    try:
        with child.told.open("a", encoding="utf-8") as told:

            def tell(key: str, value: Any) -> None:
                told.write(json.dumps([key, value]) + "\n")
                told.flush()

            try:
                work(child.name, Path(child.folder.name), tell)
            except Exception as error:
                tell("not made", f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
    finally:
        os._exit(0)


def _record(child: _Child, status: int, *, late: bool) -> Record:
    record: Record = {}
    if child.told.exists():
        record = dict(json.loads(line) for line in child.told.read_text("utf-8").splitlines())
    if late:
        record["ended"] = "timeout"
    elif status:
        record["ended"] = f"signal {os.WTERMSIG(status)}"
    return record
