"""Killed at any moment, the same command goes on, and what it writes is the same to the byte."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qplug.api.events import Result
from qplug.errors import QplugError, StageError
from qplug.output import disk
from qplug.output.journal import Journal
from qplug.output.writer import Writer
from qplug.run.quantize import quantize

if TYPE_CHECKING:
    from click.testing import Result as CliResult
    from conftest import Starter

    Contents = Callable[[Path], dict[str, bytes | None]]

KILLS = 10

# Rounds as rtn does, but gives those who want to kill it the time to.
SLOW = '''
import time
from collections.abc import Mapping
from qplug import Algorithm, NoParams, hookimpl
from qplug.numerics.rounding import round_to_nearest

class Slow(Algorithm[NoParams]):
    """Round to nearest, slowly."""

    name = "slow"

    def quantize(self, block):
        time.sleep(0.01 * len(block.linears))
        return {each.name: round_to_nearest(each.weight, each.args) for each in block.linears}

@hookimpl
def qplug_algorithms():
    return [Slow]
'''

# --- kill -9 -------------------------------------------------------------------------------------


def left_in(folder: Path) -> set[str]:
    """The names there, without what Python keeps of a plugin's file."""
    return {path.name for path in folder.iterdir()} - {"__pycache__"}


def journal_lines(partial: Path) -> int:
    journal = partial / "journal.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def wait_for_journal(partial: Path, lines: int) -> None:
    """Until it has so many lines; meanwhile there is no OUT."""
    give_up = time.monotonic() + 60
    while journal_lines(partial) < lines:
        assert not (partial.parent / "out").exists()
        assert time.monotonic() < give_up
        time.sleep(0.001)


@pytest.mark.slow
def test_killed_ten_times(
    tmp_path: Path,
    write_llama: Callable[..., Path],
    contents: Contents,
    start: Starter,
    cli: Callable[..., CliResult],
) -> None:
    model = write_llama(  # 106 MB
        tmp_path / "llama",
        shards=3,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=12,
        vocab_size=16384,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    (tmp_path / "slow.py").write_text(SLOW)
    words = ["--plugin", str(tmp_path / "slow.py"), "quantize", str(model), "--algo", "slow"]
    words += ["--shard-size", "0.015", "--out"]
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    partial = tmp_path / ".out.partial"

    rng = random.Random(0)
    finished = []
    for _ in range(KILLS):
        started = start(*words, out)
        begun = journal_lines(partial)
        enough = begun + rng.randint(1, 9)
        wait_for_journal(partial, enough)
        time.sleep(rng.uniform(0, 0.02))  # anywhere in what it does then
        os.kill(started.ids[0], signal.SIGKILL)
        assert started.wait().codes == [-signal.SIGKILL]  # it was not done
        assert not out.exists()
        finished.append(journal_lines(partial))
    assert finished == sorted(finished)
    assert finished[-1] > finished[0]

    last = cli(*words, out, "--json")
    # The first line is the fingerprint; the last may be torn.
    assert json.loads(last.stdout)["resumed"] >= finished[-1] - 2 > 0
    assert cli(*words, undisturbed).exit_code == 0
    assert contents(out) == contents(undisturbed)
    assert len([*out.glob("*.safetensors")]) > 3
    assert left_in(tmp_path) == {"llama", "slow.py", "out", "undisturbed"}


# --- the same in this process --------------------------------------------------------------------

STEPS = 14  # linears of the small model
ALL_STEPS = STEPS + 6  # and its norms and its embedding


class Stop(KeyboardInterrupt):
    """Ctrl-C at a chosen step."""


def stop_after(steps: int) -> Callable[..., None]:
    def watch(done: int, *_: object) -> None:
        if done == steps:
            raise Stop

    return watch


@pytest.fixture
def run(llama: Path, tmp_path: Path) -> Callable[..., Result]:
    """Quantizes the small model to ``out``; ``stop=n`` interrupts it after n steps."""

    def quantized(*, out: str = "out", stop: int | None = None, **changes: Any) -> Result:
        watch = None if stop is None else stop_after(stop)
        return quantize(str(llama), tmp_path / out, shard_bytes=30_000, watch=watch, **changes)

    return quantized


@pytest.fixture
def interrupted(tmp_path: Path, run: Callable[..., Result]) -> Path:
    """The partial folder of a run that was stopped after 9 steps."""
    with pytest.raises(Stop):
        run(stop=9)
    return tmp_path / ".out.partial"


@pytest.mark.slow
def test_stopped_after_every_step(
    tmp_path: Path, run: Callable[..., Result], contents: Contents
) -> None:
    run(out="undisturbed")
    for stop in range(1, ALL_STEPS + 1):
        with pytest.raises(Stop):
            run(stop=stop)
        assert not (tmp_path / "out").exists()
        result = run()
        assert result.resumed == stop
        assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
        shutil.rmtree(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "undisturbed"}


def test_steps_that_wait_for_a_slow_disk_are_kept(
    tmp_path: Path,
    run: Callable[..., Result],
    contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sync = os.fsync

    def slow(file: int) -> None:
        time.sleep(0.05)
        sync(file)

    run(out="undisturbed")
    monkeypatch.setattr(os, "fsync", slow)
    with pytest.raises(Stop):
        run(stop=9)
    monkeypatch.undo()
    assert run().resumed == 9
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_errors_of_resumed_steps_are_told_again(
    interrupted: Path, run: Callable[..., Result]
) -> None:
    again = run()
    assert again.resumed > 0
    assert again.errors == run(out="undisturbed").errors
    assert len(again.errors) == STEPS


@pytest.mark.slow
def test_stopped_between_any_two_files_at_the_end(
    tmp_path: Path,
    run: Callable[..., Result],
    contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is written when all steps are done may be cut short anywhere too."""
    run(out="undisturbed")
    wanted = contents(tmp_path / "undisturbed")
    moved = 0
    for stop in range(100):
        with monkeypatch.context() as patch:
            done = count_file_operations(patch, stop)
            try:
                run()
            except Stop:
                pass
            else:
                break
        if "move" in done:
            moved += 1
            with pytest.raises(QplugError, match="out: exists; choose another folder"):
                run()
        else:
            assert not (tmp_path / "out").exists()
            assert run().resumed == ALL_STEPS
        assert contents(tmp_path / "out") == wanted
        assert left_in(tmp_path) == {"llama", "out", "undisturbed"}
        shutil.rmtree(tmp_path / "out")
    assert stop > 20
    assert moved > 3  # and only what is not needed any more was left


def count_file_operations(patch: pytest.MonkeyPatch, stop: int) -> list[str]:
    """Lets the end of a run do ``stop`` things to files, and interrupts the next one."""
    done: list[str] = []
    finish = Writer.finish

    def counted_finish(*args: Any) -> None:
        for owner, name in [(disk, "write_new"), (disk, "move"), (disk, "remove"), (os, "fsync")]:
            patch.setattr(owner, name, counted(getattr(owner, name), done, stop))
        finish(*args)

    patch.setattr(Writer, "finish", counted_finish)
    return done


def counted(work: Callable[..., Any], done: list[str], stop: int) -> Callable[..., Any]:
    def wrapped(*args: Any, **more: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            return work(*args, **more)  # of a step, not of the end
        if len(done) == stop:
            raise Stop
        done.append(work.__name__)
        return work(*args, **more)

    return wrapped


def test_an_old_model_stays_until_the_new_one_is_whole(
    tmp_path: Path,
    llama: Path,
    run: Callable[..., Result],
    contents: Contents,
) -> None:
    run(out="out", scheme="W8A16")
    old = contents(tmp_path / "out")
    with pytest.raises(Stop):
        run(stop=5, overwrite=True)
    assert contents(tmp_path / "out") == old
    assert run(overwrite=True).resumed > 0
    run(out="undisturbed")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "out", "undisturbed"}


def test_stopped_between_the_two_moves_of_an_overwrite(
    tmp_path: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, contents: Contents
) -> None:
    run(scheme="W8A16")
    old = contents(tmp_path / "out")
    work = disk.move

    def once(path: Path, target: Path) -> None:
        if path.name == "model":
            raise Stop
        work(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(disk, "move", once)
        with pytest.raises(Stop):
            run(overwrite=True)
    assert contents(tmp_path / ".out.partial" / "replaced") == old  # nothing is lost
    with pytest.raises(QplugError, match="out: exists"):
        run()  # and it is back as soon as anything is done about it
    assert contents(tmp_path / "out") == old
    assert run(overwrite=True).resumed == ALL_STEPS
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "out"}


# --- a run that cannot go on ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"scheme": "W8A16"}, "recipe"),
        ({"group_size": 32}, "recipe"),
        ({"ignore": ["*.layers.1.*"]}, "recipe"),
        ({"seed": 1}, "recipe"),
        ({"backend": "vllm"}, "recipe"),
        ({"model": "config"}, "model"),
        ({"model": "weights"}, "model"),
        ({"model": "byte"}, "model"),
        ({"model": "tokenizer"}, "model"),
    ],
    ids=str,
)
def test_another_run_is_refused(
    changes: dict[str, Any],
    difference: str,
    llama: Path,
    interrupted: Path,
    run: Callable[..., Result],
    contents: Contents,
) -> None:
    before = contents(interrupted)
    model = changes.pop("model", None)
    if model == "config":
        config = json.loads((llama / "config.json").read_text())
        (llama / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6}))
    elif model == "weights":
        shard = next(llama.glob("*.safetensors"))
        os.utime(shard, ns=(1, 1))
    elif model == "byte":  # size and time are the same
        shard = next(llama.glob("*.safetensors"))
        status, data = shard.stat(), bytearray(shard.read_bytes())
        data[-1000] ^= 1
        shard.write_bytes(data)
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif model == "tokenizer":
        (llama / "tokenizer.json").write_text("{}")
    with pytest.raises(QplugError) as caught:
        run(**changes)
    complaint = f"holds an unfinished run with another {difference}; delete it, or pass --overwrite"
    assert str(caught.value) == f"{interrupted}: {complaint}"
    assert contents(interrupted) == before
    assert run(**changes, overwrite=True).resumed == 0


def test_another_shard_size_is_refused(llama: Path, interrupted: Path, tmp_path: Path) -> None:
    with pytest.raises(QplugError, match="with another shard size; delete it"):
        quantize(str(llama), tmp_path / "out")


def test_every_difference_is_told(llama: Path, interrupted: Path, tmp_path: Path) -> None:
    with pytest.raises(QplugError, match="with another recipe, shard size; delete it"):
        quantize(str(llama), tmp_path / "out", scheme="W8A16")


def test_overwrite_goes_on_with_the_same_run(interrupted: Path, run: Callable[..., Result]) -> None:
    assert run(overwrite=True).resumed > 0


def test_overwrite_starts_another_run_anew(
    tmp_path: Path, interrupted: Path, run: Callable[..., Result], contents: Contents
) -> None:
    assert run(scheme="W8A16", overwrite=True).resumed == 0
    run(out="undisturbed", scheme="W8A16")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_two_at_once(
    interrupted: Path, run: Callable[..., Result], contents: Contents, tmp_path: Path
) -> None:
    before = contents(interrupted)
    other = Journal(interrupted / "journal.jsonl")
    for changes in ({}, {"overwrite": True}, {"scheme": "W8A16"}):
        with pytest.raises(QplugError) as caught:
            run(**changes)
        assert str(caught.value) == f"{interrupted}: another qplug is writing there"
    assert contents(interrupted) == before
    other.close()
    assert run().resumed > 0


def test_locked_until_the_folder_is_in_place(
    tmp_path: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = disk.move
    refused = []

    def move(path: Path, target: Path) -> None:
        with pytest.raises(QplugError, match="another qplug is writing there"):
            Journal(tmp_path / ".out.partial" / "journal.jsonl")
        refused.append(path)
        work(path, target)

    monkeypatch.setattr(disk, "move", move)
    run()
    assert [path.name for path in refused] == ["model"]


# --- what was left is damaged --------------------------------------------------------------------


def shards_of(partial: Path) -> list[Path]:
    return sorted((partial / "model").glob("*.safetensors"))


def tear_journal(partial: Path) -> None:
    """The last line is cut in two."""
    text = (partial / "journal.jsonl").read_bytes()
    (partial / "journal.jsonl").write_bytes(text[:-20])


def garble_journal(partial: Path) -> None:
    """The last line was never written, though its place was: a machine lost power."""
    text = (partial / "journal.jsonl").read_bytes()
    *lines, last = text.splitlines()
    (partial / "journal.jsonl").write_bytes(b"\n".join([*lines, b"\0" * len(last)]) + b"\n")


def flip_data(partial: Path) -> None:
    """A bit of the first tensor is another one."""
    shard = shards_of(partial)[0]
    data = bytearray(shard.read_bytes())
    length = int.from_bytes(data[:8], "little")
    data[8 + length] ^= 1
    shard.write_bytes(data)


def lose_data(partial: Path) -> None:
    """The last shard misses its end."""
    shard = shards_of(partial)[-1]
    shard.write_bytes(shard.read_bytes()[:-1])


def lose_shard(partial: Path) -> None:
    shards_of(partial)[0].unlink()


def lose_header(partial: Path) -> None:
    """The place of the header holds nothing."""
    shard = shards_of(partial)[0]
    data = shard.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    shard.write_bytes(bytes(length) + data[length:])


DAMAGES = [tear_journal, garble_journal, flip_data, lose_data, lose_shard]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_work_is_done_again(
    damage: Callable[[Path], None],
    tmp_path: Path,
    interrupted: Path,
    run: Callable[..., Result],
    contents: Contents,
) -> None:
    steps = journal_lines(interrupted) - 1
    damage(interrupted)
    result = run()
    assert 0 < result.resumed < steps
    if damage is not lose_shard:
        assert result.resumed == steps - 1
    run(out="undisturbed")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_a_lost_header_is_written_again(
    tmp_path: Path, run: Callable[..., Result], contents: Contents
) -> None:
    """Also where no step of that shard is left to do."""
    with pytest.raises(Stop):
        run(stop=ALL_STEPS)
    lose_header(tmp_path / ".out.partial")
    run()
    run(out="undisturbed")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("text", ["", "{", "[]\n", "\0\0\0\n", '{"model": 1}\n'])
def test_a_journal_that_tells_nothing(
    text: str, tmp_path: Path, interrupted: Path, run: Callable[..., Result], contents: Contents
) -> None:
    (interrupted / "journal.jsonl").write_text(text)
    assert run().resumed == 0
    run(out="undisturbed")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


# --- what stays, and what does not ---------------------------------------------------------------

#: What Ctrl-C says.
KEPT = (
    r"{out}: (\d+ of 20 steps|1 of 2 blocks) are kept; the same command goes on after them\.\s+"
    "Aborted!"
)


def test_ctrl_c_keeps_what_was_done(
    tmp_path: Path, llama: Path, cli: Callable[..., CliResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    appended = Journal.append
    calls = []

    def append(journal: Journal, entry: dict[str, Any]) -> None:
        calls.append(entry)
        if len(calls) > 5:
            raise KeyboardInterrupt
        appended(journal, entry)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", append)
        result = cli("quantize", "--algo", "rtn", llama, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert re.search(KEPT.format(out=tmp_path / "out") + "$", result.stderr.strip())
    assert not (tmp_path / "out").exists()
    result = cli("quantize", "--algo", "rtn", llama, "--out", tmp_path / "out", "--json")
    assert json.loads(result.stdout)["resumed"] >= 4  # the first line is the fingerprint


LAST_BLOCK_WAITS = '600 * any("layers.1." in each.name for each in block.linears)'


def test_ctrl_c_by_a_signal(tmp_path: Path, llama: Path, start: Starter) -> None:
    # However long this process has to wait for a core, the other one is not done by then.
    (tmp_path / "slow.py").write_text(SLOW.replace("0.01 * len(block.linears)", LAST_BLOCK_WAITS))
    words = ["--plugin", tmp_path / "slow.py", "quantize", llama, "--algo", "slow"]
    started = start(*words, "--out", tmp_path / "out")
    wait_for_journal(tmp_path / ".out.partial", 3)
    os.kill(started.ids[0], signal.SIGINT)
    ended = started.wait()
    assert ended.codes == [1]
    assert re.search(KEPT.format(out=tmp_path / "out") + "$", ended.stderr.strip())
    assert journal_lines(tmp_path / ".out.partial") >= 3
    assert not (tmp_path / "out").exists()


BROKEN = '''
from qplug import Algorithm, NoParams, QplugError, hookimpl
from qplug.numerics.rounding import round_to_nearest

class Broken(Algorithm[NoParams]):
    """Round to nearest, but not all."""

    name = "broken"

    def quantize(self, block):
        for each in block.linears:
            if "layers.1.mlp" in each.name:
                {action}
        return {{each.name: round_to_nearest(each.weight, each.args) for each in block.linears}}

@hookimpl
def qplug_algorithms():
    return [Broken]
'''


@pytest.fixture
def broken(
    tmp_path: Path, llama: Path, cli: Callable[..., CliResult]
) -> Callable[[str], CliResult]:
    def run(action: str) -> CliResult:
        plugin = tmp_path / "mine.py"
        plugin.write_text(BROKEN.format(action=action))
        out = ("--out", tmp_path / "out")
        return cli("--plugin", plugin, "quantize", llama, "--algo", "broken", *out)

    return run


def test_what_the_user_can_mend_leaves_nothing(
    tmp_path: Path, broken: Callable[[str], CliResult]
) -> None:
    result = broken("raise QplugError('too small; choose another')")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("Error: model.layers.1")
    assert result.stderr.endswith(": too small; choose another\n")
    assert left_in(tmp_path) == {"llama", "mine.py"}


def test_a_bug_of_a_plugin_keeps_what_was_done(
    tmp_path: Path, broken: Callable[[str], CliResult]
) -> None:
    result = broken("1 / 0")
    error = result.exception
    assert isinstance(error, StageError)
    assert isinstance(error.__cause__, ZeroDivisionError)
    assert str(error).startswith(f"plugin broken ({tmp_path / 'mine.py'}): model.layers.1")
    assert journal_lines(tmp_path / ".out.partial") > 5
    assert not (tmp_path / "out").exists()
