"""Writes the folder of a run: next to OUT first, resumable, and moved to OUT when complete."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from safetensors.torch import save
from torch import Tensor

from qplug.api.events import RaisedBlock
from qplug.checkpoint.open import INDEX
from qplug.checkpoint.tensor_file import read_header, tensor_bytes
from qplug.errors import QplugError
from qplug.files.typed import Typed
from qplug.output import disk
from qplug.output.checksums import KIND, crc32, file_checksum
from qplug.output.entry import Entry
from qplug.output.journal import Run, differences
from qplug.output.manifest import MANIFEST, RAISED, read_raised
from qplug.output.ownership import refuse_existing
from qplug.output.plan import Plan
from qplug.output.result_files import manifest_text
from qplug.output.shard_layout import NEW, ShardLayout
from qplug.output.source_bytes import SourceBytes
from qplug.output.unfinished import KeptError, Unfinished, clean_up

#: Returns the plan in which blocks are raised.
Replan: TypeAlias = Callable[[Sequence[RaisedBlock]], Plan]

_PIECE = 1 << 22  # bytes of a tensor that are written at once
_SMALL = 1 << 18  # bytes whose checksum takes less time than it takes to wake a thread
#: Steps that may wait for the disk: two of any size, for which it has memory, and more if they are
#: as small together. Those that wait at once share a sync.
_PENDING, _MOST_PENDING, _PENDING_BYTES = 2, 16, 1 << 26
_OPEN_SHARDS = 24  # that are open at once, more than steps are pending; steps fill them in order
_CHECKERS = 4  # threads that read what an earlier run wrote
_TEXTS = ("config.json", "README.md", INDEX, MANIFEST)

#: What stops every further step too, so that no step is kept.
_LIMITS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk is full",
    errno.EFBIG: "a file would be larger than this process may write (ulimit -f)",
    errno.EMFILE: "this process may not open so many files (ulimit -n)",
    errno.ENFILE: "this machine has too many open files",
}

#: The content of a tensor to write: the tensor, or its bytes in pieces.
Content: TypeAlias = Tensor | Iterable[bytes]


@dataclass(frozen=True)
class _Written:
    """A step that is written to ``files``, whose bytes the disk may not have yet."""

    number: int
    files: Sequence[int]
    crcs: tuple[int, ...]
    report: dict[str, Any]


class Writer:
    """Writes the tensors of ``plan``. Use it as a context manager.

    If the context ends by a QplugError or a full disk, the unfinished folder is removed. If it ends
    by a kill, Ctrl-C or a bug, the unfinished folder stays, and the same command resumes the run;
    after Ctrl-C or a bug it holds each step that was given to ``write``.
    ``finished`` are the reports of the steps that earlier runs of this command wrote, by number.
    """

    def __init__(
        self,
        out: Path,
        plan: Plan,
        fingerprint: Mapping[str, Any],
        source: SourceBytes,
        *,
        overwrite: bool,
        companions: Sequence[Path] = (),
        single_file: str | None = None,
        learned: Iterable[str] = (),
        spare: int = 0,
        replan: Replan | None = None,
    ) -> None:
        """Opens or resumes the unfinished folder of ``out``.

        ``fingerprint`` describes the run, and ``source`` its float tensors; only a run with the
        same of both is resumed. ``companions`` are files to copy to OUT, ``single_file`` is the
        name of the file that replaces the shards, ``learned`` names the algorithms that call
        ``cached``. ``spare`` are bytes that must be free in addition to those of the plan.
        ``replan`` returns the plan with raised blocks, None if the run raises none. Raises
        QplugError if ``out`` cannot be written, holds an unfinished run with another fingerprint
        (unless ``overwrite``) or files that qplug did not write, is being written by another
        process, or if the disk is too full.
        """
        self._spare, self._overwrite = spare, overwrite
        self._source, self._replan = source, replan
        self._companions = {_name_of(path): path for path in companions}
        self._single_file = single_file
        clean_up(out)
        refuse_existing(out, overwrite=overwrite)
        self._out = out.resolve()
        try:
            self._folder = Unfinished(self._out)
        except OSError as error:
            raise QplugError(f"{out}: cannot be written: {error.strerror}") from error
        #: The blocks that this run, or the earlier runs that it continues, raised.
        self.raised: tuple[RaisedBlock, ...] = ()
        self._base, self._layout = plan, ShardLayout(self._folder.model, plan)
        shards = {path.name for path in self._layout.headers}  # raised blocks add none
        again = {f"{name}{NEW}" for name in shards} if replan is not None else set()
        single = {single_file} if single_file else set()
        files = frozenset({*shards, *again, *self._companions, *_TEXTS, *single})
        self._crcs: dict[str, int] = {}
        self._learned: dict[str, dict[str, Any]] = {}
        try:
            refuse_existing(out, overwrite=overwrite)  # another run may just have finished
            run = Run(fingerprint, files, frozenset(learned))
            self._folder.refuse_foreign(run)
            self.finished = self._resume(run)
            self._refuse_full_disk()
        except BaseException as error:
            if isinstance(error, KeptError) or self._has_begun():
                self._folder.journal.close()
            else:
                self._folder.remove()
            if isinstance(error, OSError):
                raise QplugError(f"{out}: cannot be written: {error.strerror}") from error
            raise
        self._files: dict[Path, int] = {}
        self._thread = ThreadPoolExecutor(1, "qplug-writer")
        self._summing = ThreadPoolExecutor(1, "qplug-summing")
        self._noting = ThreadPoolExecutor(1, "qplug-noting")
        self._reading = ThreadPoolExecutor(1, "qplug-copying")
        self._pending: list[tuple[int, Future[Future[None]]]] = []  # bytes, and what is awaited
        self._written: deque[_Written] = deque()

    # --- beginning -------------------------------------------------------------------------------

    @property
    def _plan(self) -> Plan:
        return self._layout.plan

    def _take(self, raised: Sequence[RaisedBlock]) -> None:
        """Takes the plan with ``raised`` blocks."""
        if self._replan is not None and self.raised != tuple(raised):
            self.raised = tuple(raised)
            plan = self._replan(self.raised) if raised else self._base
            self._layout = ShardLayout(self._folder.model, plan)

    def _has_begun(self) -> bool:
        """Whether the unfinished folder holds more than the beginning of a journal."""
        model = self._folder.model
        return bool(self._folder.entries) or (model.is_dir() and any(model.iterdir()))

    def _resume(self, run: Run) -> dict[int, dict[str, Any]]:
        """Returns the reports of finished steps, by number; deletes those of a different run."""
        earlier = self._folder.run
        entries = self._folder.entries
        if earlier is None or earlier.fingerprint != run.fingerprint:
            if earlier is not None and entries:
                self._refuse_other_run(differences(earlier.fingerprint, run.fingerprint))
            self._folder.restart(run)
            return {}
        if self._replan is None and _raised_in(entries):
            self._refuse_other_run("--on-stop")
            self._folder.restart(run)
            return {}
        self._take(_raised_in(entries))
        steps, valid = self._read(entries)
        noted = next(iter(self._learned.values()), None)
        is_same = self._source.are_as_noted(
            {number: entry.source for number, entry in steps.items()},
            noted["source"] if noted else None,
        )
        if not is_same:
            self._refuse_other_run("model")
            self._learned.clear()
            self._take(())
            self._folder.restart(run)
            return {}
        self._folder.journal.keep(valid)
        self._take(_raised_in(entries[:valid]))
        self._folder.open_model()
        # After a power cut the journal may list steps whose bytes never reached the disk.
        with ThreadPoolExecutor(_CHECKERS, "qplug-checker") as pool:
            are_whole = pool.map(self._is_whole, steps.values())
            whole = [e for e, is_whole in zip(steps.values(), are_whole, strict=True) if is_whole]
        for entry in whole:
            self._crcs.update(zip(self._plan.steps[entry.step].outputs, entry.crcs, strict=True))
        return {entry.step: entry.report for entry in whole}

    def _refuse_other_run(self, difference: str) -> None:
        """Raises QplugError unless an unfinished run with some ``difference`` may be deleted."""
        if not self._overwrite:
            raise KeptError(
                f"{self._folder.folder}: holds an unfinished run with another {difference}; "
                "delete it, or pass --overwrite"
            )

    def _read(self, entries: Sequence[Mapping[str, Any]]) -> tuple[dict[int, Entry], int]:
        """Returns the finished steps in ``entries`` by number, and how many entries are valid.

        Learned tensors that are damaged end the valid entries: all steps after them used them.
        """
        steps: dict[int, Entry] = {}
        for count, plain in enumerate(entries):
            if "step" in plain:
                is_known = self._folder.run is None or self._folder.run.learned <= {*self._learned}
                entry = Entry.read(plain, self._plan) if is_known else None
                if entry is None:
                    return steps, count
                steps[entry.step] = entry
            elif RAISED in plain:
                continue
            elif "learned" in plain:
                name = plain["learned"]
                if not self._is_learned(plain):
                    return steps, count
                self._learned[name] = dict(plain)
            else:  # an earlier run was killed as it moved its result
                return steps, count
        return steps, len(entries)

    def _is_learned(self, plain: Mapping[str, Any]) -> bool:
        """Whether the tensors that an algorithm learned are on disk as their entry says."""
        name, run = plain["learned"], self._folder.run
        if run is None or not (isinstance(name, str) and name in run.learned):
            return False
        try:
            found = file_checksum(self._folder.learned(name))
        except OSError:
            return False
        return plain == {"learned": name, **found, "source": plain.get("source")}

    def _is_whole(self, entry: Entry) -> bool:
        """Whether the tensors of a step are on disk as the journal says."""
        outputs = self._plan.steps[entry.step].outputs
        try:
            return all(
                crc32(self._layout.places[name].chunks()) == crc
                for name, crc in zip(outputs, entry.crcs, strict=True)
            )
        except (QplugError, FileNotFoundError):
            return False

    def _refuse_full_disk(self) -> None:
        """Raises QplugError if the steps that are not finished need more bytes than are free."""
        unfinished = (s.nbytes for n, s in enumerate(self._plan.steps) if n not in self.finished)
        need = sum(unfinished) + self._spare
        free = shutil.disk_usage(self._folder.folder).free
        if need > free:
            raise QplugError(
                f"{self._out.parent}: the disk is full: {need / 2**30:.2f} GiB are "
                f"to be written, {free / 2**30:.2f} GiB are free"
            )

    # --- writing ---------------------------------------------------------------------------------

    def write(
        self,
        number: int,
        contents: Mapping[str, Content],
        report: dict[str, Any],
    ) -> None:
        """Writes the tensors of step ``number`` in the background, then enters it in the journal.

        ``contents`` are by full name; bytes in pieces are those of a tensor of the source. Waits if
        too many steps are pending. Raises the error of an earlier step that could not be written.
        """
        size = self._plan.steps[number].nbytes
        while self._has_no_room(size):
            self._wait()
        done = self._thread.submit(self._write, number, contents, report)
        self._pending.append((size, done))

    def _has_no_room(self, size: int) -> bool:
        """Whether a step of ``size`` bytes has to wait for one that is pending."""
        count, waiting = len(self._pending), sum(size for size, _ in self._pending)
        return count >= _PENDING and (count >= _MOST_PENDING or waiting + size > _PENDING_BYTES)

    def _wait(self) -> None:
        """Waits for the oldest pending step. Raises the error for which it was not written."""
        with self._keeping():
            self._pending.pop(0)[1].result().result()

    def _write(
        self,
        number: int,
        contents: Mapping[str, Content],
        report: dict[str, Any],
    ) -> Future[None]:
        """Writes a step; returns when it will be in the journal."""
        step = self._plan.steps[number]
        files: dict[int, None] = {}
        for name in step.outputs:
            content, place = contents[name], self._layout.places[name]
            file = self._file(place.path)
            self._crcs[name] = self._write_tensor(content, file, place.start)
            if not isinstance(content, Tensor):
                self._source.note(name, self._crcs[name])
            files[file] = None
        crcs = tuple(self._crcs[name] for name in step.outputs)
        self._written.append(_Written(number, [*files], crcs, report))
        # Another thread waits for the disk, while this one writes the next step.
        return self._noting.submit(self._note)

    def _note(self) -> None:
        """Enters the steps that are written in the journal, once the disk has their bytes.

        There may be none, if they were entered with a step before.
        """
        steps = [self._written.popleft() for _ in range(len(self._written))]
        for file in dict.fromkeys(file for step in steps for file in step.files):
            # Before the journal entry: after a power cut it must not list bytes that are lost.
            # Now, while the next step is computed; at the end of the run it would have to wait.
            os.fsync(file)
        for step in steps:
            source = self._source.of_step(step.number)
            entry = Entry(step.number, step.crcs, source, step.report)
            try:
                self._folder.journal.append(entry.to_dict())
            except ValueError as error:
                name = self._plan.steps[step.number].name
                raise QplugError(f"{name}: an error or a range of it is not finite") from error

    def _write_tensor(self, content: Content, file: int, offset: int) -> int:
        """Writes ``content`` at ``offset`` of ``file``; returns its CRC-32.

        A second thread computes the checksum of a piece while the piece is written: neither waits
        for the other's half of the time.
        """
        crc, coming = 0, None
        for piece in self._pieces(content):
            if coming is not None:
                crc = coming.result()
            coming = self._summing.submit(zlib.crc32, piece, crc) if len(piece) > _SMALL else None
            offset = disk.write_at(file, piece, offset)
            if coming is None:
                crc = zlib.crc32(piece, crc)
        return crc if coming is None else coming.result()

    def _pieces(self, content: Content) -> Iterator[bytes | memoryview]:
        """Yields the bytes of ``content``, a few MiB at a time.

        A further thread reads and checks a piece of a file while the one before is written.
        """
        if isinstance(content, Tensor):
            whole = tensor_bytes(content)
            for start in range(0, len(whole), _PIECE):
                yield whole[start : start + _PIECE]
            return
        pieces = iter(content)
        piece = next(pieces, None)
        while piece is not None:
            if len(piece) <= _SMALL:
                yield piece
                piece = next(pieces, None)
                continue
            coming = self._reading.submit(next, pieces, None)
            yield piece
            piece = coming.result()

    def _file(self, path: Path) -> int:
        """Returns the descriptor of a shard, which is open, with its header written."""
        if path in self._files:
            return self._files[path]
        while len(self._files) >= _OPEN_SHARDS:
            oldest = next(iter(self._files))
            os.close(self._files.pop(oldest))  # each step syncs what it wrote
        is_new = not path.exists()
        try:
            file = disk.open_own(path)
        except disk.StrangeFileError as error:
            raise KeptError(f"{path}: {error}; move it away") from None
        self._files[path] = file
        disk.write_at(file, self._layout.headers[path], 0)
        if is_new:
            disk.sync_folder(path.parent)
        return file

    def stored(self, module: str) -> dict[str, Tensor]:
        """Returns the written tensors of ``module`` by local name, without its children's."""
        return {
            local: self._layout.readable[f"{module}.{local}"].read()
            for local in self._layout.by_module.get(module, ())
        }

    def raise_block(self, block: RaisedBlock) -> None:
        """Enters ``block`` in the journal as raised, and makes room for what it will take.

        All steps that are done are on disk afterwards. If the process is killed meanwhile, the
        steps that share a shard with the block may have to be computed again.
        """
        while self._pending:
            self._wait()
        old = self._layout
        self._take([*(each for each in self.raised if each.name != block.name), block])
        moving = [
            n for path, n in old.sizes.items() if old.headers[path] != self._layout.headers[path]
        ]
        more = self._plan.nbytes - old.plan.nbytes + max(moving, default=0)
        free = shutil.disk_usage(self._folder.folder).free
        if more > free:
            raise KeptError(
                f"{self._out.parent}: the disk is full: {block.name} is raised to "
                f"{block.schemes[-1]}, for which {more / 2**30:.2f} GiB more are needed, and "
                f"{free / 2**30:.2f} GiB are free; the finished steps are kept"
            )
        with self._keeping():
            self._folder.journal.append({RAISED: asdict(block)})
            self._folder.journal.sync()
            while self._files:
                os.close(self._files.popitem()[1])
            old.moved_to(self._layout, self._crcs)

    def cached(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Returns the tensors of ``make()``, stored under ``name`` in the unfinished folder.

        If an earlier run of this command stored them, they are read instead, so that a resumed run
        uses exactly the same numbers.
        """
        path = self._folder.learned(name)
        if name not in self._learned:
            data = save({key: value.contiguous() for key, value in make().items()})
            with self._keeping():
                self._folder.forget(name)
                new = path.with_suffix(".new")
                disk.write_new(new, [data])
                disk.move(new, path)
                disk.sync_folder(path.parent)
                entry = {"learned": name, "bytes": len(data), KIND: zlib.crc32(data)}
                entry["source"] = self._source.of_model()
                self._folder.journal.append(entry)
                self._folder.journal.sync()
            self._learned[name] = entry
        return {key: tensor.read() for key, tensor in read_header(path).items()}

    # --- ending ----------------------------------------------------------------------------------

    def finish(
        self,
        texts: Mapping[str, str],
        record: Mapping[str, Any],
        convert: Callable[[Path], None] | None = None,
    ) -> None:
        """Writes the other files of the model, and moves the complete folder to OUT.

        ``texts`` are the contents of files to write, by file name, and ``record`` is the content of
        qplug.json, to which the checksums of all files are added. ``convert`` is called with the
        folder when all other files are in it, and may replace the shards by the single file. Raises
        KeptError if OUT, or a file in the unfinished folder, is not qplug's.
        """
        while self._pending:
            self._wait()
        with self._keeping():
            self._finish(texts, record, convert)
        self._close()

    def _finish(
        self,
        texts: Mapping[str, str],
        record: Mapping[str, Any],
        convert: Callable[[Path], None] | None,
    ) -> None:
        model = self._folder.model
        for path, size in self._layout.sizes.items():  # a power cut may have lost a header
            file = self._file(path)
            os.ftruncate(file, size)
            os.fsync(file)
        index = self._plan.index()
        if index is not None:
            texts = {**texts, INDEX: json.dumps(index, indent=2) + "\n"}
        files = {name: _copy(path, model / name) for name, path in self._companions.items()}
        for name, text in texts.items():
            files[name] = _put(text, model / name)
        self._folder.remove_all_but({*files, *(path.name for path in self._layout.headers)})
        if convert is not None:
            convert(model)
        shards = [path for path in self._layout.headers if path.exists()]
        if self._single_file is not None:
            files[self._single_file] = _settled(model / self._single_file)
            files.pop(INDEX, None)
        _put(manifest_text(record, self._checksums(shards, files)), model / MANIFEST)
        self._folder.refuse_foreign_model({MANIFEST, *files, *(path.name for path in shards)})
        for parent in {(model / name).parent for name in files} - {model}:
            disk.sync_folder(parent)
        disk.sync_folder(model)
        self._folder.publish(overwrite=self._overwrite)

    def _checksums(
        self, shards: Sequence[Path], files: Mapping[str, Mapping[str, int]]
    ) -> dict[str, Any]:
        """Returns the checksums of ``shards`` and of the other ``files``, for qplug.json."""
        crcs = {n: crc for n, crc in self._crcs.items() if self._layout.places[n].path in shards}
        return {
            "kind": KIND,
            "tensors": dict(sorted(crcs.items())),
            "headers": {path.name: zlib.crc32(self._layout.headers[path]) for path in shards},
            "files": dict(sorted(files.items())),
        }

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """A context in which an error of the disk, unless a limit is reached, keeps all steps."""
        try:
            yield
        except OSError as error:
            if _limit_reached(error):
                raise
            raise KeptError(
                f"{self._out.parent}: {error.strerror or error}; the finished steps are kept, and "
                "the same command resumes the run"
            ) from error

    def _close(self) -> None:
        """Stops the threads, and closes the shards and the journal."""
        self._stop(is_kept=True)
        for file in self._files.values():
            with suppress(OSError):
                os.close(file)
        self._files.clear()
        self._folder.journal.close()

    def _stop(self, *, is_kept: bool) -> None:
        """Ends the threads: after all pending steps if the folder is kept, else after one."""
        self._thread.shutdown(cancel_futures=not is_kept)
        for thread in (self._reading, self._summing, self._noting):
            thread.shutdown()

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
        limit = _limit_reached(error)
        if limit or (isinstance(error, QplugError) and not isinstance(error, KeptError)):
            self._stop(is_kept=False)
            with suppress(OSError):
                self._folder.remove()
        self._close()
        if limit:
            raise QplugError(f"{self._out.parent}: {limit}; nothing was kept") from error


def _raised_in(entries: Sequence[Mapping[str, Any]]) -> list[RaisedBlock]:
    """Returns the raised blocks in ``entries`` of a journal, each as it was raised last."""
    raised = [read_raised(Typed("the journal", e[RAISED])) for e in entries if RAISED in e]
    return [*{block.name: block for block in raised}.values()]


def _name_of(companion: Path) -> str:
    """Returns where a file of the source goes in OUT, as a relative path."""
    is_template = companion.parent.name == "additional_chat_templates"
    return f"{companion.parent.name}/{companion.name}" if is_template else companion.name


def _limit_reached(error: BaseException) -> str | None:
    """Returns which limit of the disk or of the process ``error`` reports; None if it is none."""
    return _LIMITS.get(error.errno or 0) if isinstance(error, OSError) else None


def _put(text: str, path: Path) -> dict[str, int]:
    """Writes a text file; returns its checksum."""
    data = text.encode()
    disk.write_new(path, [data])
    return {"bytes": len(data), KIND: zlib.crc32(data)}


def _copy(source: Path, target: Path) -> dict[str, int]:
    """Copies a file; returns the checksum of what was read."""
    size, crc = 0, 0

    def pieces() -> Iterator[bytes]:
        nonlocal size, crc
        with source.open("rb") as file:
            while piece := file.read(1 << 20):
                size, crc = size + len(piece), zlib.crc32(piece, crc)
                yield piece

    disk.write_new(target, pieces())
    return {"bytes": size, KIND: crc}


def _settled(path: Path) -> dict[str, int]:
    """Waits until the disk has a file that something else wrote; returns its checksum."""
    try:
        file = disk.open_own(path)
    except disk.StrangeFileError as error:
        raise KeptError(f"{path}: {error}") from None
    try:
        os.fsync(file)
    finally:
        os.close(file)
    return file_checksum(path)
