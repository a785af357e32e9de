"""Writes the folder of a run: next to OUT first, resumable, and moved to OUT when complete."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeAlias

from safetensors.torch import load_file, save_file
from torch import Tensor

from qplug.checkpoint.names import by_module
from qplug.checkpoint.open import INDEX
from qplug.checkpoint.tensor_file import FileTensor, lay_out, tensor_bytes
from qplug.errors import QplugError
from qplug.output.journal import Journal, differences
from qplug.output.plan import Plan

_PENDING = 2  # steps that may wait for the disk; more steps would only cost memory

#: The content of a tensor to write: the tensor, or its bytes in pieces.
Content: TypeAlias = Tensor | Iterable[bytes]


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    """Raises QplugError if ``out`` must not be written: it exists, or its parent does not.

    With ``overwrite`` an existing folder is accepted if it is empty or a model's, and neither a
    link nor a parent of the current folder.
    """
    if os.path.lexists(out):  # unlike Path.exists(), does not raise on a name that is too long
        if not overwrite:
            raise QplugError(f"{out}: exists; choose another folder, or pass --overwrite")
        if Path.cwd().is_relative_to(out.resolve()):
            raise QplugError(f"{out}: is or contains the current folder, so it is not overwritten")
        is_model = (out / "config.json").is_file() or (out.is_dir() and not any(out.iterdir()))
        if out.is_symlink() or not is_model:
            raise QplugError(f"{out}: is not a model's folder, so it is not overwritten")
    if not out.absolute().parent.is_dir():
        raise QplugError(f"{out.absolute().parent}: no such folder to write into")


class Writer:
    """Writes the tensors of ``plan``. Use it as a context manager.

    If the context ends by a QplugError or a full disk, the unfinished folder is removed. If it ends
    by a kill, Ctrl-C or a bug, the unfinished folder stays, and the same command resumes the run.
    ``finished`` are the reports of the steps that earlier runs of this command wrote, by number.
    """

    def __init__(
        self,
        out: Path,
        plan: Plan,
        fingerprint: Mapping[str, Any],
        *,
        overwrite: bool,
        spare: int = 0,
    ) -> None:
        """Opens or resumes the unfinished folder of ``out``.

        ``fingerprint`` describes the run; only a run with the same fingerprint is resumed.
        ``spare`` are bytes that must be free in addition to those of the plan. Raises QplugError if
        ``out`` cannot be written, holds an unfinished run with another fingerprint (unless
        ``overwrite``), is being written by another process, or if the disk is too full.
        """
        refuse_existing(out, overwrite=overwrite)
        self._spare = spare
        self._out, self._plan = out.resolve(), plan
        self._partial = self._out.with_name(f".{self._out.name}.partial")
        self._model = self._partial / "model"
        try:
            self._model.mkdir(parents=True, exist_ok=True)
            self._journal = Journal(self._partial / "journal.jsonl")
        except OSError as error:
            for folder in (self._model, self._partial):
                with suppress(OSError):  # may belong to another run, or be missing
                    folder.rmdir()
            raise QplugError(f"{out}: cannot be written: {error.strerror}") from error
        self._lay_out_shards()
        try:
            self.finished = self._resume(fingerprint, overwrite=overwrite)
            self._refuse_full_disk()
        except (QplugError, OSError) as error:
            with suppress(OSError):
                self._journal.close()
            if not any(self._model.iterdir()):
                shutil.rmtree(self._partial)
            if isinstance(error, OSError):
                raise QplugError(f"{out}: cannot be written: {error.strerror}") from error
            raise
        self._files: dict[Path, BinaryIO] = {}
        self._thread = ThreadPoolExecutor(1, "qplug-writer")
        self._pending: list[Future[None]] = []

    # --- beginning -------------------------------------------------------------------------------

    def _lay_out_shards(self) -> None:
        """Computes the header of each shard and the place of each tensor."""
        self._places: dict[str, FileTensor] = {}
        self._headers: dict[Path, bytes] = {}
        for file, specs in self._plan.shards().items():
            path = self._model / file
            self._headers[path], tensors = lay_out(path, specs)
            self._places.update(tensors)

    def _resume(
        self, fingerprint: Mapping[str, Any], *, overwrite: bool
    ) -> dict[int, dict[str, Any]]:
        """Returns the reports of finished steps, by number; deletes those of a different run."""
        earlier, entries = self._journal.read()
        if earlier != fingerprint:
            if earlier is not None and entries and not overwrite:
                raise QplugError(
                    f"{self._partial}: holds an unfinished run with another "
                    f"{differences(earlier, fingerprint)}; delete it, or pass --overwrite"
                )
            entries = []
            for file in self._partial.glob("*.safetensors"):
                file.unlink()
            shutil.rmtree(self._model)
            self._model.mkdir()
            self._journal.restart(fingerprint)
        # After a power cut the journal may list steps whose bytes never reached the disk.
        return {e["step"]: e["report"] for e in entries if self._checksum(e["step"]) == e["crc"]}

    def _checksum(self, number: int) -> int:
        """Returns the CRC-32 of the tensors of a step on disk; -1 if any is missing."""
        crc = 0
        for name in self._plan.steps[number].outputs:
            try:
                for piece in self._places[name].chunks():
                    crc = zlib.crc32(piece, crc)
            except (QplugError, FileNotFoundError):
                return -1
        return crc

    def _refuse_full_disk(self) -> None:
        """Raises QplugError if the steps that are not finished need more bytes than are free."""
        unfinished = (s.nbytes for n, s in enumerate(self._plan.steps) if n not in self.finished)
        need = sum(unfinished) + self._spare
        free = shutil.disk_usage(self._partial).free
        if need > free:
            raise QplugError(
                f"{self._out.parent}: the disk is full: {need / 2**30:.2f} GiB are "
                f"to be written, {free / 2**30:.2f} GiB are free"
            )

    # --- writing ---------------------------------------------------------------------------------

    def write(self, number: int, contents: Mapping[str, Content], report: dict[str, Any]) -> None:
        """Writes the tensors of step ``number`` in the background, then enters it in the journal.

        ``contents`` are by full name. Waits if too many steps are pending. Raises the error of an
        earlier step that could not be written.
        """
        while len(self._pending) >= _PENDING:
            self._pending.pop(0).result()
        self._pending.append(self._thread.submit(self._write, number, contents, report))

    def _write(self, number: int, contents: Mapping[str, Content], report: dict[str, Any]) -> None:
        crc = 0
        files: dict[BinaryIO, None] = {}
        for name in self._plan.steps[number].outputs:
            content, place = contents[name], self._places[name]
            file = self._file(place.path)
            file.seek(place.start)
            for piece in [tensor_bytes(content)] if isinstance(content, Tensor) else content:
                file.write(piece)
                crc = zlib.crc32(piece, crc)
            files[file] = None
        for file in files:
            # Before the journal entry: after a kill the journal must not list unwritten bytes.
            file.flush()
            # Now, while the next step is computed; at the end of the run it would have to wait.
            os.fsync(file.fileno())
        self._journal.append({"step": number, "crc": crc, "report": report})

    def _file(self, path: Path) -> BinaryIO:
        """Returns the open file of a shard, with its header written."""
        if path not in self._files:
            self._files[path] = path.open("r+b" if path.exists() else "w+b")
            self._files[path].write(self._headers[path])
        return self._files[path]

    def stored(self, module: str) -> dict[str, Tensor]:
        """Returns the written tensors of ``module`` by local name, without its children's."""
        return {
            local: self._places[f"{module}.{local}"].read()
            for local in self._by_module.get(module, ())
        }

    @cached_property
    def _by_module(self) -> dict[str, list[str]]:
        return by_module(self._places)

    def cached(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Returns the tensors of ``make()``, stored under ``name`` in the unfinished folder.

        If an earlier run of this command stored them, they are read instead, so that a resumed run
        uses exactly the same numbers.
        """
        path = self._partial / f"{name}.safetensors"
        if not path.exists():
            new = path.with_suffix(".new")
            save_file({key: value.contiguous() for key, value in make().items()}, new)
            with new.open("rb") as written:
                os.fsync(written.fileno())
            new.rename(path)
        return load_file(path)

    # --- ending ----------------------------------------------------------------------------------

    def finish(
        self,
        companions: Iterable[Path],
        texts: Mapping[str, str],
        convert: Callable[[Path], None] | None = None,
    ) -> None:
        """Writes the other files of the model, and moves the complete folder to OUT.

        ``companions`` are files to copy. ``texts`` are the contents of files to write, by file
        name. ``convert`` is called with the folder when all files are in it, and may replace the
        shards by other files.
        """
        while self._pending:
            self._pending.pop(0).result()
        for path in companions:
            is_template = path.parent.name == "additional_chat_templates"
            target = self._model / (f"{path.parent.name}/{path.name}" if is_template else path.name)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        index = self._plan.index()
        if index is not None:
            texts = {**texts, INDEX: json.dumps(index, indent=2) + "\n"}
        for name, text in texts.items():
            (self._model / name).write_text(text, encoding="utf-8")
        for path in self._headers:  # a power cut may have lost the header of a finished shard
            self._file(path).flush()
        if convert is not None:
            convert(self._model)
        for path in self._model.rglob("*"):
            if path.is_file():
                with path.open("rb") as written:
                    os.fsync(written.fileno())
        old = self._partial.with_name(f".{self._out.name}.old")
        if self._out.exists():
            shutil.rmtree(old, ignore_errors=True)
            self._out.rename(old)
        self._model.rename(self._out)
        shutil.rmtree(self._partial)
        shutil.rmtree(old, ignore_errors=True)
        self._close()  # last, since this unlocks the journal

    def _close(self) -> None:
        """Stops the writing thread, and closes the shards and the journal."""
        self._thread.shutdown(cancel_futures=True)
        open_files: list[BinaryIO | Journal] = [*self._files.values(), self._journal]
        for file in open_files:
            with suppress(OSError):  # on a full disk, closing writes the rest and fails again
                file.close()
        self._files.clear()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            return
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        self._close()
        if is_full or isinstance(error, QplugError):
            shutil.rmtree(self._partial)
        if is_full:
            raise QplugError(f"{self._out.parent}: the disk is full; nothing was kept") from error
