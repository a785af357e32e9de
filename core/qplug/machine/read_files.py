"""A program of its own: reads the modules in folders, so that the system has them at hand.

It runs by its path, without qplug and without site-packages, since it must be quick to start.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

#: Files that are read at a time: a disk answers many questions as fast as one.
_THREADS = 32
#: Files by which the program finds out whether the system has read a folder's files already, and
#: the seconds that each takes then, at most.
_TRIED, _AT_HAND = 30, 2e-4
#: The most bytes that are read of a file, and of it at once: some libraries are large.
_MOST_BYTES, _AT_ONCE = 1 << 25, 1 << 20
#: Folders without modules that are imported.
_LEFT_OUT = ("__pycache__", "bin", "include", "lib", "share", "test", "testing", "tests")


class Readers:
    """Threads that read the modules in folders, each with its kind: see ``read``."""

    def __init__(self, folders: list[tuple[str, str]]) -> None:
        self._todo = folders[::-1]  # the last one is next
        self._lock = threading.Condition()
        self._working = 0

    def run(self) -> None:
        threads = [threading.Thread(target=self._work) for _ in range(_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                while not self._todo and self._working:
                    self._lock.wait()
                if not self._todo:
                    return
                kind, path = self._todo.pop()
                self._working += 1
            found: list[tuple[str, str]] = []
            with suppress(OSError):  # whoever imports it says what is wrong
                found = read(kind, path)
            with self._lock:
                self._todo += reversed(found)
                self._working -= 1
                self._lock.notify_all()


def read(kind: str, path: str) -> list[tuple[str, str]]:
    """Reads the module at ``path``, or returns what is to be read of the folder at ``path``.

    ``kind`` is "tree" for a folder and those below it, "flat" for a folder without those, and
    "text" for a tree of modules that are read as text, without being compiled.
    """
    if not path.endswith((".py", ".so")):
        return listed(kind, path)
    file = Path(path)
    if file.suffix == ".py" and kind != "text":
        file.stat()  # Python compares its time with that of the compiled module
        file = file.parent / "__pycache__" / f"{file.stem}.{sys.implementation.cache_tag}.pyc"
    with file.open("rb", buffering=0) as opened:
        for _ in range(_MOST_BYTES // _AT_ONCE):
            if not opened.read(_AT_ONCE):
                break
    return []


def listed(kind: str, folder: str) -> list[tuple[str, str]]:
    """Returns the modules in ``folder``, and the folders if ``kind`` says so."""
    Path(folder).stat()
    with os.scandir(folder) as entries:
        return [
            (kind, entry.path)
            for entry in entries
            if entry.name.endswith((".py", ".so"))
            or (
                kind != "flat"
                and entry.is_dir(follow_symlinks=False)
                and entry.name not in _LEFT_OUT
            )
        ]


def at_hand(kind: str, folder: str) -> bool:
    """Whether the system has the modules in ``folder``, by the time that reading some takes."""
    modules = [path for _, path in listed(kind, folder) if path.endswith(".py")][:_TRIED]
    began = time.perf_counter()
    for path in modules:
        read(kind, path)
    return time.perf_counter() - began < _AT_HAND * len(modules)


def main(words: list[str]) -> None:
    """Reads the modules in the folders ``KIND=PATH``, unless those of the first are at hand."""
    folders = [(kind, path) for kind, _, path in (word.partition("=") for word in words)]
    with suppress(OSError):
        if at_hand(*folders[0]):
            return
    Readers(folders).run()


if __name__ == "__main__":
    main(sys.argv[1:])
