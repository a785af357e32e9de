"""What lies in the unfinished folder or in OUT and is not qplug's stays as it is."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import STEPS, contents, is_sound, make_source, run

from qplug.errors import QplugError
from qplug.output import disk
from qplug.output.journal import Journal
from qplug.output.writer import Writer


class Stop(KeyboardInterrupt):
    """Ctrl-C at a chosen moment."""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a float model."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # nobody cuts the power of this machine
    make_source(tmp_path / "source")
    return tmp_path


@pytest.fixture
def wanted(root: Path) -> dict[str, bytes]:
    """What an undisturbed run writes."""
    run(root)
    found = contents(root / "out")
    shutil.rmtree(root / "out")
    return found


@pytest.fixture
def partial(root: Path, wanted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The unfinished folder of a run that was stopped before its end."""
    del wanted  # was written before
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "finish", stop)
        with pytest.raises(Stop):
            run(root)
    return root / ".out.partial"


def stop(writer: Writer, *_: object) -> None:
    while writer._pending:
        writer._wait()
    raise Stop


def refused(root: Path, **options: bool) -> str:
    """The line in which a run is refused; it changes nothing."""
    before = contents(root)
    with pytest.raises(QplugError) as caught:
        run(root, **options)
    assert contents(root) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path) -> None:
    """Puts a file of the user's there."""
    path.write_text("mine")


# --- planted before the run ----------------------------------------------------------------------


def as_link(path: Path, target: Path) -> None:
    path.symlink_to(target)


def as_hard_link(path: Path, target: Path) -> None:
    path.hardlink_to(target)


def as_pipe(path: Path, _: Path) -> None:
    os.mkfifo(path)


def as_folder(path: Path, _: Path) -> None:
    path.mkdir()


PLANTS = [as_link, as_hard_link, as_pipe, as_folder]
PLACES = ["journal.jsonl", "unfinished.txt", "turn.safetensors", "turn.new", "model/config.json"]
PLACES += ["model/model-00002-of-00003.safetensors", "model/tokenizer.json", "model/qplug.json"]


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
@pytest.mark.parametrize("place", PLACES)
def test_planted_in_an_unfinished_folder(
    place: str, plant: Callable[[Path, Path], None], root: Path, partial: Path
) -> None:
    thesis = root / "thesis.tex"
    thesis.write_text("years of work")
    (partial / place).unlink(missing_ok=True)
    plant(partial / place, thesis)
    with pytest.raises(QplugError) as caught:
        run(root)
    assert str(caught.value).startswith(f"{partial}")
    assert "\n" not in str(caught.value)
    assert thesis.read_text() == "years of work"
    assert os.path.lexists(partial / place)


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_a_journal_planted_in_a_new_folder(plant: Callable[[Path, Path], None], root: Path) -> None:
    thesis = root / "thesis.tex"
    thesis.write_text("years of work")
    (root / ".out.partial").mkdir()
    plant(root / ".out.partial" / "journal.jsonl", thesis)
    with pytest.raises(QplugError, match=r"journal\.jsonl"):
        run(root)
    assert thesis.read_text() == "years of work"


def test_a_folder_that_is_a_link(root: Path, partial: Path) -> None:
    partial.rename(root / "elsewhere")
    partial.symlink_to(root / "elsewhere")
    assert refused(root).startswith(f"{partial}: is a link; move it away")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_folder_or_a_file_of_somebody_else(root: Path, partial: Path) -> None:
    for path in (partial, partial / "journal.jsonl", partial / "model" / "config.json"):
        path.touch()
        os.chown(path, 12345, 12345)
        assert "belongs to another user" in refused(root)
        os.chown(path, os.geteuid(), os.getegid())


@pytest.mark.parametrize("names", [["a.txt"], ["model/a.safetensors"], ["journal.jsonl"]])
def test_a_folder_that_is_not_qplugs(names: list[str], root: Path) -> None:
    partial = root / ".out.partial"
    for name in names:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_text("mine\n")
    told = refused(root)
    assert told == (f"{partial}: has no journal of qplug; move it away, or choose another --out")
    assert refused(root, overwrite=True) == told


@pytest.mark.parametrize("name", ["a.txt", "model/a.txt", "model/sub/a.txt", "a.safetensors"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_put_into_an_unfinished_folder(
    name: str, overwrite: bool, root: Path, partial: Path, wanted: dict[str, bytes]
) -> None:
    extra = partial / name
    extra.parent.mkdir(exist_ok=True)
    extra.write_text("mine")
    shown = partial / "model" / "sub" if "sub" in name else extra
    assert refused(root, overwrite=overwrite) == (
        f"{shown}: was not written by qplug; move it away"
    )
    extra.rename(root / "mine")
    if "sub" in name:
        extra.parent.rmdir()
    assert run(root) == STEPS
    assert contents(root / "out") == wanted


# --- put there during the run --------------------------------------------------------------------


def at_the_end(patch: pytest.MonkeyPatch, work: Callable[[], None]) -> None:
    """Does ``work`` when all steps are written."""
    finish = Writer.finish

    def after(writer: Writer, *args: object) -> None:
        work()
        finish(writer, *args)  # type: ignore[arg-type]

    patch.setattr(Writer, "finish", after)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["folder", "full folder", "file", "link", "model"])
def test_out_appears(
    kind: str,
    overwrite: bool,
    root: Path,
    wanted: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = root / "out"

    def make() -> None:
        if kind == "file":
            out.write_text("mine")
        elif kind == "link":
            out.symlink_to(root / "source")
        else:
            out.mkdir()
            if kind == "full folder":
                (out / "thesis.tex").write_text("mine")
            if kind == "model":
                (out / "config.json").write_text("{}")

    with monkeypatch.context() as patch:
        at_the_end(patch, make)
        if overwrite and kind == "folder":  # nothing is in it
            run(root, overwrite=True)
            assert contents(out) == wanted
            return
        with pytest.raises(QplugError) as caught:
            run(root, overwrite=overwrite)
    told = str(caught.value)
    assert told.startswith(f"{out}: ")
    assert told.endswith(
        f"the result is complete in {root / '.out.partial' / 'model'}: move out away, and the same "
        "command puts it there"
    )
    assert is_sound(root / ".out.partial" / "model")
    assert os.path.lexists(out)
    assert kind != "full folder" or contents(out) == {"thesis.tex": b"mine"}
    out.rename(root / "mine")
    assert run(root) == STEPS
    assert contents(out) == wanted
    assert {path.name for path in root.iterdir()} == {"source", "out", "mine"}


def test_a_file_put_into_the_folder_to_replace(
    root: Path, wanted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(root, factor=3.0)
    with monkeypatch.context() as patch:
        at_the_end(patch, functools.partial(write, root / "out" / "a"))
        with pytest.raises(QplugError, match=r"out: holds a, which qplug did not write, so it is"):
            run(root, overwrite=True)
    assert (root / "out" / "a").read_text() == "mine"
    (root / "out" / "a").unlink()
    assert run(root, overwrite=True) == STEPS
    assert contents(root / "out") == wanted


def test_a_file_put_into_the_model(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = root / ".out.partial" / "model" / "a.txt"
    with monkeypatch.context() as patch:
        at_the_end(patch, functools.partial(write, extra))
        with pytest.raises(QplugError, match=r"a\.txt: was not written by qplug; move it away"):
            run(root)
    assert extra.read_text() == "mine"
    assert not (root / "out").exists()
    extra.unlink()
    assert run(root) == STEPS


def test_a_folder_with_the_name_of_an_old_one(root: Path) -> None:
    (root / ".out.old").mkdir()
    (root / ".out.old" / "mine").write_text("mine")
    run(root, factor=3.0)
    run(root, overwrite=True)
    assert contents(root / ".out.old") == {"mine": b"mine"}


def test_a_system_that_cannot_rename_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_renameat2", lambda: None)
    with monkeypatch.context() as patch:
        at_the_end(patch, (root / "out").mkdir)
        with pytest.raises(QplugError, match="out: was made by something else; the result is"):
            run(root)
    (root / "out").rmdir()
    assert run(root) == STEPS


# --- damage --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_any_byte_of_the_journal_damaged(
    root: Path, partial: Path, wanted: dict[str, bytes]
) -> None:
    """The steps from there on are done again."""
    shutil.copytree(partial, root / "kept")
    whole = (partial / "journal.jsonl").read_bytes()
    ends = [n for n, byte in enumerate(whole) if byte == 10]
    rng = random.Random(0)
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        (partial / "journal.jsonl").write_bytes(damaged)
        line = sum(end < place for end in ends)
        assert run(root) == max(0, line - 2)  # lines of the run and of learned tensors come first
        assert contents(root / "out") == wanted
        assert not partial.exists()
        shutil.rmtree(root / "out")
        shutil.copytree(root / "kept", partial)


LINES = ["null", "[]", "{}", '{"step": 0}', "1" * 5000, "[" * 100_000, '{"step": 1e999}', "\0" * 90]
LINES += ['{"step": -1}', '{"step": 99}', '{"step": true}', '{"learned": []}', '{"published": 1}']
LINES += ['{"step": 0, "crcs": [%s], "source": 0, "report": {}}' % ("9" * 5000)]


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
@pytest.mark.parametrize("sealed", [False, True])
def test_strange_lines_in_the_journal(
    line: str, sealed: bool, root: Path, partial: Path, wanted: dict[str, bytes]
) -> None:
    """Also with a right checksum, which nobody makes by accident."""
    path = partial / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    if sealed:
        path.write_bytes(b"".join(lines[:4]))
        journal = Journal(path)
        journal.read()
        try:
            journal._append(json.loads(line))
        except (ValueError, RecursionError, AttributeError, TypeError):
            return  # no line that a journal can write
        finally:
            journal.close()
    else:
        path.write_bytes(b"".join([*lines[:4], line.encode() + b"\n", *lines[4:]]))
    assert run(root) == 2
    assert contents(root / "out") == wanted


def test_lines_twice_and_lines_of_another_run(
    root: Path, partial: Path, wanted: dict[str, bytes]
) -> None:
    path = partial / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, lines[3], lines[2]]))
    assert run(root) == STEPS
    assert contents(root / "out") == wanted


def flip_learned(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def zero_learned(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def cut_learned(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:20])


@pytest.mark.parametrize("damage", [flip_learned, zero_learned, cut_learned, Path.unlink])
def test_damaged_learned_tensors_are_learned_again(
    damage: Callable[[Path], None], root: Path, partial: Path, wanted: dict[str, bytes]
) -> None:
    """And so is all that was computed with them."""
    damage(partial / "turn.safetensors")
    assert run(root) == 0
    assert contents(root / "out") == wanted


# --- other weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor", range(STEPS))
@pytest.mark.parametrize("learns", [False, True])
def test_one_byte_of_the_source_changed(
    tensor: int, learns: bool, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Name, size and time of the file are the same."""
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "finish", stop)
        with pytest.raises(Stop):
            run(root, learns=learns)
    file = root / "source" / "model.safetensors"
    status, data = file.stat(), bytearray(file.read_bytes())
    data[-(200 + 1600 * tensor)] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert refused(root, learns=learns) == (
        f"{root / '.out.partial'}: holds an unfinished run with another model; "
        "delete it, or pass --overwrite"
    )
    assert run(root, learns=learns, overwrite=True) == 0
    again = contents(root / "out")
    shutil.rmtree(root / "out")
    run(root, learns=learns)
    assert contents(root / "out") == again
