"""The hidden folder next to OUT that holds an unfinished run, and how it becomes OUT.

``.OUT.partial`` has the journal, a note that says whose folder it is, the tensors that algorithms
learned, and ``model``, which is renamed to OUT at the end. A folder that OUT replaces is moved to
``replaced`` first. Nothing in the folder is followed, written over or removed that qplug did not
put there.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from qplug.errors import QplugError
from qplug.files.json_text import parse_json, read_json
from qplug.files.regular import read_text
from qplug.output import disk
from qplug.output.checksums import file_checksum
from qplug.output.journal import Journal, Run
from qplug.output.manifest import MANIFEST
from qplug.output.ownership import foreign, not_own, remove_own, remove_written

_NOTE = "unfinished.txt"
_NOTE_TEXT = (
    b"qplug keeps an unfinished run here. The same command resumes it.\n"
    b"Delete this folder to give the run up.\n"
)
_JOURNAL = "journal.jsonl"
_LEARNED = (".safetensors", ".new")  # endings of learned tensors: whole, and as they are written
_MOST = 1 << 30  # bytes of a journal or a manifest
_PUBLISHED = "published"  # the key of the last entry: the CRC-32 of qplug.json


def begun_dataset(out: Path) -> str | None:
    """Returns the dataset of the run that wrote ``out``, or of one that is to be continued there.

    None if there is no such run, or if it read no data; also for names and files that the run
    itself refuses.
    """
    with suppress(QplugError, OSError, ValueError, KeyError, TypeError):
        journal = _partial(out) / _JOURNAL
        if journal.exists():
            first = read_text(journal, _MOST).partition("\n")[0]
            recipe = parse_json(first, str(journal))["run"]["recipe"]
        else:
            recipe = read_json(out / MANIFEST)["recipe"]
        return str(recipe["calibration"]["dataset"])
    return None


def _partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


class KeptError(QplugError):
    """An error after which the finished steps stay on disk, so that the same command resumes."""


class Unfinished:
    """The unfinished folder of ``out``, locked while it is open.

    ``run`` and ``entries`` are what its journal had at the beginning.
    """

    def __init__(self, out: Path) -> None:
        """Opens the folder, or makes it.

        Raises QplugError if another process has it open, or if it is not a folder of qplug, and
        OSError if it cannot be made.
        """
        self.out = out
        self.folder = _partial(out)
        self.model = self.folder / "model"
        self.replaced = self.folder / "replaced"
        with suppress(FileExistsError):
            self.folder.mkdir(0o700)
        self._refuse_strange_folder()
        try:
            self.journal = Journal(self.folder / _JOURNAL)
        except OSError:
            with suppress(OSError):  # it is not empty
                self.folder.rmdir()
            raise
        try:
            self.run, self.entries = self.journal.read()
            self._is_ending = bool(self.entries) and _PUBLISHED in self.entries[-1]
            if not self._is_own():
                raise QplugError(f"{self.folder}: has no journal of qplug; {self._way_out}")
            self._restore()
        except BaseException:
            self.journal.close()
            raise

    @property
    def _way_out(self) -> str:
        return "move it away, or choose another --out"

    def _refuse_strange_folder(self) -> None:
        """Raises QplugError if the folder cannot be qplug's, before anything is put into it."""
        try:
            disk.refuse_strange(self.folder, is_folder=True)
        except disk.StrangeFileError as error:
            raise QplugError(f"{self.folder}: {error}; {self._way_out}") from None
        names = {path.name for path in self.folder.iterdir()}
        if _JOURNAL not in names and not (names <= {_NOTE} and self._has_note(or_blank=True)):
            raise QplugError(f"{self.folder}: has no journal of qplug; {self._way_out}")

    def _is_own(self) -> bool:
        """Whether the journal or the note says that the folder is qplug's, or nothing is in it."""
        if self.run is not None or self._has_note() or self.journal.is_old():
            return True
        names = {path.name for path in self.folder.iterdir()}
        return (
            names <= {_NOTE, _JOURNAL} and self.journal.is_blank() and self._has_note(or_blank=True)
        )

    def _has_note(self, *, or_blank: bool = False) -> bool:
        """Whether the note is there; with ``or_blank`` also if it is missing or has no content."""
        path = self.folder / _NOTE
        try:
            disk.refuse_strange(path)
            text = path.read_bytes() if path.stat().st_size <= len(_NOTE_TEXT) else b"?"
        except FileNotFoundError:
            return or_blank
        except (disk.StrangeFileError, OSError):
            return False
        return text == _NOTE_TEXT or (or_blank and not text.strip(b"\0"))

    # --- beginning -------------------------------------------------------------------------------

    def refuse_foreign(self, run: Run) -> None:
        """Raises KeptError if anything is in the folder that neither ``run`` nor qplug wrote."""
        if os.path.lexists(self.replaced):
            raise KeptError(f"{self.replaced}: was in {self.out} before; move it away")
        known = self._known(run)
        learned = {f"{name}{ending}" for name in known.learned for ending in _LEARNED}
        files = {_NOTE, _JOURNAL, *learned, *(f"{self.model.name}/{name}" for name in known.files)}
        extra = foreign(self.folder, files)
        if extra is not None:
            raise KeptError(f"{extra}: was not written by qplug; move it away")
        for name in sorted(files):
            path = self.folder / name
            try:
                with suppress(FileNotFoundError):
                    disk.refuse_strange(path)
            except disk.StrangeFileError as error:
                raise KeptError(f"{path}: {error}; move it away") from None

    def refuse_foreign_model(self, names: Collection[str]) -> None:
        """Raises KeptError if the folder of the model has more than the files ``names``."""
        extra = foreign(self.model, names)
        if extra is not None:
            raise KeptError(f"{extra}: was not written by qplug; move it away")

    def remove_all_but(self, names: Collection[str]) -> None:
        """Removes the files of the model that an earlier attempt to finish it wrote."""
        for name in self._known(None).files - {*names}:
            disk.remove(self.model / name)

    def _known(self, run: Run | None) -> Run:
        """Returns all names of files that this run and the earlier one may write."""
        runs = [each for each in (run, self.run) if each is not None]
        return Run(
            {},
            frozenset(name for each in runs for name in each.files),
            frozenset(name for each in runs for name in each.learned),
        )

    def restart(self, run: Run) -> None:
        """Removes what an earlier run wrote, and begins the journal of ``run``."""
        known = self._known(run)
        if self.model.exists():
            remove_written(self.model, known.files)
        for name in known.learned:
            self.forget(name)
        disk.write_new(self.folder / _NOTE, [_NOTE_TEXT])
        disk.sync_folder(self.folder)
        self.journal.restart(run)
        self.run, self.entries = run, []
        self.open_model()
        disk.sync_folder(self.folder)
        disk.sync_folder(self.folder.parent)

    def open_model(self) -> None:
        """Makes the folder of the model, if it is missing."""
        self.model.mkdir(exist_ok=True)

    def learned(self, name: str) -> Path:
        """Returns the file with the tensors that the algorithm ``name`` learned."""
        return self.folder / f"{name}{_LEARNED[0]}"

    def forget(self, name: str) -> None:
        """Removes the tensors that the algorithm ``name`` learned."""
        for ending in _LEARNED:
            disk.remove(self.folder / f"{name}{ending}")

    # --- ending ----------------------------------------------------------------------------------

    def publish(self, *, overwrite: bool) -> None:
        """Renames the complete model to OUT, and removes all else.

        With ``overwrite`` a folder of qplug that is there is replaced. Raises KeptError if anything
        else is there, or if there is something and ``overwrite`` is False.
        """
        crc = file_checksum(self.model / MANIFEST)["crc32"]
        self.journal.append({_PUBLISHED: crc})
        self._is_ending = True
        self.journal.sync()
        if overwrite and os.path.lexists(self.out):
            self._replace()
        try:
            disk.move(self.model, self.out)
        except OSError as error:
            if not os.path.lexists(self.out):
                self._restore()
                raise
            raise KeptError(f"{self.out}: was made by something else; {self._kept}") from error
        disk.sync_folder(self.out.parent)
        disk.sync_folder(self.folder)
        self._clean()

    def _replace(self) -> None:
        """Moves OUT aside, if it is qplug's. Raises KeptError if it is not."""
        sentence = not_own(self.out)
        if sentence is None:
            disk.move(self.out, self.replaced)
            disk.sync_folder(self.folder)
            disk.sync_folder(self.out.parent)
            sentence = not_own(self.replaced)  # nobody puts anything into it any more
        if sentence is not None:
            self._restore()
            raise KeptError(f"{self.out}: {sentence}, so it is not overwritten; {self._kept}")

    @property
    def _kept(self) -> str:
        return (
            f"the result is complete in {self.model}: move {self.out.name} away, and the same "
            "command puts it there"
        )

    def _restore(self) -> None:
        """Moves the replaced folder back to OUT, if nothing is there."""
        if self._is_ending and _is_folder(self.replaced) and not os.path.lexists(self.out):
            disk.move(self.replaced, self.out)
            disk.sync_folder(self.out.parent)
            disk.sync_folder(self.folder)

    @property
    def is_published(self) -> bool:
        """Whether an earlier run moved its result to OUT, and was killed while it cleaned up."""
        if not self._is_ending or os.path.lexists(self.model):
            return False
        try:
            crc = file_checksum(self.out / MANIFEST)["crc32"]
            return bool(crc == self.entries[-1][_PUBLISHED])
        except OSError:
            return False

    def remove(self) -> None:
        """Removes everything that qplug wrote, and unlocks. What is not qplug's stays."""
        self._restore()
        known = self._known(None)
        if self.model.exists():
            remove_written(self.model, known.files)
        self._clean()

    def _clean(self) -> None:
        """Removes all but the model, the journal last: it says whose folder this is."""
        try:
            if _is_folder(self.replaced) and os.path.lexists(self.out):
                with suppress(QplugError):  # qplug.json was damaged meanwhile; the folder stays
                    remove_own(self.replaced)
            for name in self._known(None).learned:
                self.forget(name)
            names = {path.name for path in self.folder.iterdir()}
            if names <= {_NOTE, _JOURNAL}:
                disk.remove(self.folder / _NOTE)
                disk.sync_folder(self.folder)
                disk.remove(self.folder / _JOURNAL)
                with suppress(OSError):  # somebody has just put something into it
                    self.folder.rmdir()
                disk.sync_folder(self.folder.parent)
        finally:
            self.journal.close()


def clean_up(out: Path) -> None:
    """Finishes what an earlier run of qplug was killed at after it had written ``out``.

    Removes the unfinished folder if the result was moved to ``out`` already. Moves back a folder
    that was about to be replaced.
    """
    out = out.resolve()
    if not out.name:
        return  # the root of all folders, which no run replaces
    folder = out.with_name(f".{out.name}.partial")
    with suppress(QplugError, OSError):  # the run says so itself, if it comes so far
        if not folder.is_dir() or folder.is_symlink():
            return
        if not any(folder.iterdir()):
            folder.rmdir()
            return
        unfinished = Unfinished(out)
        if unfinished.is_published:
            unfinished._clean()
        else:
            unfinished.journal.close()


def kept_steps(out: Path) -> int:
    """Returns how many steps of the unfinished run of ``out`` are on disk; 0 if there is no run.

    The steps are 0 also if another process is writing them.
    """
    _, entries = _kept_journal(out)
    return sum("step" in entry for entry in entries)


def kept_fingerprint(out: Path) -> Mapping[str, Any]:
    """Returns the fingerprint of the unfinished run of ``out``; empty if there is no run.

    It is empty also if another process is writing there.
    """
    run, _ = _kept_journal(out)
    return {} if run is None else run.fingerprint


def _kept_journal(out: Path) -> tuple[Run | None, list[dict[str, Any]]]:
    journal_file = out.resolve().with_name(f".{out.resolve().name}.partial") / _JOURNAL
    with suppress(QplugError, OSError):
        if journal_file.is_file():
            journal = Journal(journal_file)
            try:
                return journal.read()
            finally:
                journal.close()
    return None, []


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
