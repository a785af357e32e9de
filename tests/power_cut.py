"""Records what a run does to files, and builds what a disk may hold after a power cut.

As ALICE (Pillai et al., OSDI 2014) and CrashMonkey do: bytes that were not synced are there, lost,
torn between sectors, or zeros. A name that was not synced is there or not. A rename is atomic; the
order of operations that were not synced is lost.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qplug.output import disk

SECTOR = 512
_RECORDED = (
    *("open", "close", "mkdir", "rmdir", "unlink", "rename"),
    *("write", "pwrite", "ftruncate", "fsync"),
)

#: The number of a folder, and a name in it.
Place = tuple[int, str]
_ROOT = (-1, "")


@dataclass(frozen=True)
class Op:
    """One operation on the file or folder with the number ``node``.

    ``kind`` is "name", "write", "cut" or "sync". A "name" leaves the place ``old`` and enters the
    place ``new``. ``data`` are the bytes that are written at ``offset``, which is also the size to
    which a file is cut.
    """

    kind: str
    node: int
    old: Place | None = None
    new: Place | None = None
    offset: int = 0
    data: bytes = b""

    @property
    def nodes(self) -> set[int]:
        """The file whose bytes change, or the folders whose names change."""
        if self.kind != "name":
            return {self.node}
        return {place[0] for place in (self.old, self.new) if place is not None}


class Log:
    """The operations of a run below ``root``, and what was there before."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ops: list[Op] = []
        self.files: dict[int, bytes] = {}
        self.folders = {0}
        self.names: dict[Place, int] = {}
        self._load(root, 0)
        self._now = {_ROOT: 0, **self.names}  # as the run sees it
        self._open: dict[int, int] = {}
        self._lock = threading.RLock()

    def _load(self, folder: Path, number: int) -> None:
        for path in sorted(folder.iterdir()):
            node = self.names[number, path.name] = len(self.files) + len(self.folders)
            if path.is_dir():
                self.folders.add(node)
                self._load(path, node)
            else:
                self.files[node] = path.read_bytes()

    # --- recording -------------------------------------------------------------------------------

    @contextmanager
    def recording(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Records all that is done through ``os`` in the context."""
        with monkeypatch.context() as patch:
            patch.setattr(disk, "_renameat2", lambda: None)
            for name in _RECORDED:
                patch.setattr(os, name, self._recorded(name))
            yield

    def _recorded(self, name: str) -> Any:
        work = getattr(os, name)

        def recorded(*args: Any, **more: Any) -> Any:
            with self._lock:
                size = os.fstat(args[0]).st_size if name == "write" else 0
                result = work(*args, **more)
                if name == "open":
                    self._opened(args[0], result)
                elif name == "close":
                    self._open.pop(args[0], None)
                elif isinstance(args[0], int):
                    self._changed(name, size, *args)
                else:
                    self._named(name, *args)
                return result

        return recorded

    def _opened(self, path: Any, file: int) -> None:
        place = self._place(path)
        if place is None:
            return
        if place not in self._now:  # created
            self._enter(place, is_folder=False)
        self._open[file] = self._now[place]

    def _changed(self, name: str, size: int, file: int, *args: Any) -> None:
        node = self._open.get(file)
        if node is None:
            return
        if name == "fsync":
            self.ops.append(Op("sync", node))
        elif name == "ftruncate":
            self.ops.append(Op("cut", node, offset=args[0]))
        else:
            offset = size if name == "write" else args[1]
            self.ops.append(Op("write", node, offset=offset, data=bytes(args[0])))

    def _named(self, name: str, path: Any, *args: Any) -> None:
        place = self._place(path)
        if place is None:
            return
        if name == "mkdir":
            self._enter(place, is_folder=True)
            return
        node, new = self._now.pop(place), self._place(args[0]) if name == "rename" else None
        if new is not None:
            self._now[new] = node
        self.ops.append(Op("name", node, old=place, new=new))

    def _enter(self, place: Place, *, is_folder: bool) -> None:
        node = self._now[place] = len(self.files) + len(self.folders)
        if is_folder:
            self.folders.add(node)
        else:
            self.files[node] = b""
        self.ops.append(Op("name", node, new=place))

    def _place(self, path: Any) -> Place | None:
        """The place of a path; None outside of ``root``."""
        whole = Path(os.path.abspath(path))  # noqa: PTH100 - links are not resolved
        if whole == self.root:
            return _ROOT
        if not whole.is_relative_to(self.root):
            return None
        *parents, name = whole.relative_to(self.root).parts
        node = 0
        for parent in parents:
            node = self._now[node, parent]
        return node, name

    # --- after a cut -----------------------------------------------------------------------------

    def killed(self, count: int, root: Path) -> None:
        """Builds what is there if the process is killed after ``count`` operations."""
        self._build(self.ops[:count], None, root)

    def cut(self, count: int, rng: random.Random, root: Path) -> None:
        """Builds what may be there if the power is cut after ``count`` operations."""
        self._build(self.ops[:count], rng, root)

    def _build(self, ops: Sequence[Op], rng: random.Random | None, root: Path) -> None:
        files = {node: bytearray(data) for node, data in self.files.items()}
        names = dict(self.names)
        durable: set[int] = set()
        synced: set[int] = set()
        for number in reversed(range(len(ops))):
            if ops[number].kind == "sync":
                synced.add(ops[number].node)
            elif ops[number].nodes & synced:
                durable.add(number)
        # A system writes what it likes: nearly all, or nearly nothing.
        share = rng.choice([0.05, 0.5, 0.95]) if rng is not None else 1.0
        for number, op in enumerate(ops):
            is_safe = rng is None or number in durable
            if op.kind == "name":
                if is_safe or (rng is not None and rng.random() < share):
                    _rename(op, names)
            elif op.kind == "cut":
                if is_safe or (rng is not None and rng.random() < share):
                    _resize(files[op.node], op.offset)
            elif op.kind == "write":
                _write(op, files[op.node], None if is_safe else rng, share)
        self._materialize(0, root, files, names)

    def _materialize(
        self, node: int, path: Path, files: dict[int, bytearray], names: dict[Place, int]
    ) -> None:
        if node in self.folders:
            path.mkdir(exist_ok=True)
            for (folder, name), child in names.items():
                if folder == node:
                    self._materialize(child, path / name, files, names)
        else:
            path.write_bytes(files[node])


def _rename(op: Op, names: dict[Place, int]) -> None:
    if op.old is not None and names.get(op.old) == op.node:
        del names[op.old]
    if op.new is not None:
        for place in [place for place, node in names.items() if node == op.node]:
            del names[place]
        names[op.new] = op.node


def _resize(data: bytearray, size: int) -> None:
    data[size:] = bytes(max(0, size - len(data)))


def _write(op: Op, data: bytearray, rng: random.Random | None, share: float) -> None:
    """Writes all; with ``rng`` some sectors of it, the others stay or are zeros."""
    end = op.offset + len(op.data)
    if rng is None:
        if len(data) < end:
            _resize(data, end)
        data[op.offset : end] = op.data
        return
    for start in range(op.offset - op.offset % SECTOR, end, SECTOR):
        first, last = max(start, op.offset), min(start + SECTOR, end)
        if rng.random() < share:
            piece = op.data[first - op.offset : last - op.offset]
        elif rng.random() < 0.5:
            piece = bytes(last - first) if len(data) <= first else b""
        else:
            piece = b""
        if piece:
            if len(data) < last:
                _resize(data, last)
            data[first:last] = piece
