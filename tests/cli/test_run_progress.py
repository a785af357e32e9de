"""What a run shows: stages, blocks and the time left, as a bar on a terminal and in plain lines."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qplug.api.events import BlockReport, Estimate, RunPlan, RunStart
from qplug.cli import run_progress as shown
from qplug.cli.outcome import tell_outcome
from qplug.cli.plan_text import data_warning, duration, in_words, plan_paragraph

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    Cli = Callable[..., Result]


def plan(*seconds: float, estimate: Estimate | None = None) -> RunPlan:
    return RunPlan(
        model="some/model",
        architecture="LlamaForCausalLM",
        parameters=8_030_261_248,
        blocks=len(seconds),
        algorithm="awq",
        scheme="W4A16",
        backend="vllm",
        serve="qplug serve {}",
        dataset="demo",
        samples=128,
        seq_len=512,
        device="cuda:0 (NVIDIA H100)",
        source_bytes=16_060_522_496,
        bytes=5_700_000_000,
        estimate=estimate,
        block_seconds=seconds,
    )


def start(*seconds: float, done: int = 0) -> RunStart:
    """A run whose first step is an embedding, and whose blocks are a step each."""
    ends = tuple(range(2, 2 + len(seconds)))
    return RunStart(Path("out"), len(seconds) + 2, done, ends, plan(*seconds))


def test_the_time_left_comes_from_the_costs_and_then_from_the_blocks_that_are_done() -> None:
    blocks = shown.Blocks(start(1.0, 1.0, 2.0), now=100.0)
    assert blocks.left(100.0) == 4.0
    assert blocks.left(100.5) == 3.5
    assert blocks.left(104.5) is None  # no nonsense when the estimate was too short
    assert not blocks.finish(1, 101.0)  # the embedding is no block
    assert blocks.finish(2, 105.0)
    assert (blocks.done, blocks.left(105.0)) == (1, 15.0)  # it took 5 seconds instead of 1
    assert blocks.left(106.0) == 14.0


def test_blocks_of_an_earlier_run_say_nothing_about_the_time_of_this_one() -> None:
    blocks = shown.Blocks(start(1.0, 1.0, 1.0, 1.0, done=3), now=10.0)
    assert (blocks.done, blocks.left(10.0)) == (2, 2.0)
    blocks.finish(4, 13.0)
    assert blocks.left(13.0) == 3.0


def test_without_costs_the_first_block_must_be_done() -> None:
    run = RunStart(Path("out"), 4, 0, (2, 3), plan())
    blocks = shown.Blocks(run, now=0.0)
    assert blocks.left(1.0) is None
    blocks.finish(2, 8.0)
    assert blocks.left(8.0) == 8.0


def test_the_paragraph_says_what_it_does_and_takes() -> None:
    costs = Estimate("H100", 1, 190.0, {}, 13 << 30, 4 << 30, 6 << 30)
    assert plan_paragraph(plan(1.0, estimate=costs)) == (
        "some/model (LlamaForCausalLM, 8.03 billion parameters, 1 block) becomes W4A16 by awq for "
        "vllm: 16,060.5 MB -> 5,700.0 MB. It calibrates on 128 windows of 512 tokens of demo. On "
        "cuda:0 (NVIDIA H100) it takes about 3.2 minutes, 13.0 GiB of GPU memory, 4.0 GiB of "
        "memory of the host, and 6.0 GiB on disk (docs/scale.md says how good this estimate is)."
    )
    assert plan_paragraph(plan()).endswith("the time of this algorithm is not known.")
    assert [in_words(n) for n in (950, 4_196_608, 671_000_000_000)] == [
        *("950", "4.2 million", "671 billion")
    ]
    assert [duration(n) for n in (4.62, 119, 121, 8000)] == [
        "4.6 s",
        "120 s",
        "2 minutes",
        "2.2 hours",
    ]


def test_a_model_that_is_calibrated_on_the_documentation_of_python_is_warned_of() -> None:
    warning = data_warning(plan())
    assert warning is not None
    assert warning.startswith("some/model is calibrated on demo, which is Python's documentation; ")
    assert "--dataset text --dataset-opt path=FILE" in warning
    for fine in ({"model": "qplug:demo"}, {"dataset": "text"}, {"dataset": ""}):
        assert data_warning(replace(plan(), **fine)) is None


def test_plain_lines_are_few(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(shown.time, "monotonic", lambda: now[0])
    with shown.run_progress("opening some/model") as progress:
        for stage in ("opening", "data", "trial pass"):
            progress.stage(stage)
        progress.qplug_run_begun(start(*[10.0] * 8))
        progress.stage("blocks")
        for number in range(2, 10):
            now[0] += 16
            progress.qplug_block_done(
                BlockReport(f"b.{number}", number, 10, losses={"a": 0.25 / number})
            )
        progress.stage("writing")
    opening, paragraph, warning, *lines = capsys.readouterr().err.splitlines()
    assert opening == "opening some/model"
    assert paragraph.startswith("some/model (")
    assert warning.startswith("Warning: some/model is calibrated on demo, ")
    assert lines == [
        "block 2 of 8 is done (loss 0.0833), about 96 s left",
        "block 4 of 8 is done (loss 0.0500), about 64 s left",
        "block 6 of 8 is done (loss 0.0357), about 32 s left",
    ]


def test_a_terminal_shows_each_stage_and_the_block(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    with shown.run_progress("opening [bold]x\x1b]0;pwn\x07") as progress:
        assert progress._progress is not None
        for stage in ("data", "trial pass"):
            progress.stage(stage)
            progress._progress.refresh()
        progress.qplug_run_begun(start(30.0, 30.0, done=2))
        progress.stage("blocks")
        progress._progress.refresh()
    err = capsys.readouterr().err
    for word in ("opening [bold]x", "data", "trial pass", "block 2 of 2", "about 30 s left"):
        assert word in err, word
    assert "going on: 1 of 2 blocks were kept from an earlier run" in err
    assert "\x1b]0;" not in err
    assert "-:--:--" not in err


def test_a_note_of_each_block_is_said_once(llama: Path, cli: Cli, tmp_path: Path) -> None:
    plugin = tmp_path / "noisy.py"
    plugin.write_text(
        "from qplug import Algorithm, NoParams, hookimpl\n"
        "from qplug.numerics import nearest\n"
        "class Noisy(Algorithm[NoParams]):\n"
        "    '''Rounds and says so.'''\n"
        "    name = 'noisy'\n"
        "    def quantize(self, block):\n"
        "        block.notes.append('rounds as it likes')\n"
        "        return {linear.name: nearest(linear) for linear in block.linears}\n"
        "@hookimpl\n"
        "def qplug_algorithms():\n"
        "    return [Noisy]\n"
    )
    words = ("--algo", "noisy", "--group-size", 32, "--backend", "vllm")
    result = cli("--plugin", plugin, "quantize", llama, *words, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    (note,) = (line for line in result.stdout.splitlines() if line.startswith("note: "))
    assert note.startswith("note: rounds as it likes (")


def test_json_is_alone_on_stdout(llama: Path, cli: Cli, tmp_path: Path) -> None:
    words = ("--algo", "rtn", "--group-size", 32, "--json")
    result = cli("quantize", llama, *words, "--out", tmp_path / "out")
    assert json.loads(result.stdout)["quality"] is None
    assert result.stderr.splitlines()[0] == f"opening {llama}"


def test_outputs_and_weights_are_not_said_alike(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qplug import quantize

    done = quantize(str(llama), tmp_path / "out", scheme="W8A16", group_size=32, device="cpu")
    tell_outcome(done)
    tell_outcome(replace(done, losses=done.errors))
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("weights of layers were rounded by ") for line in lines) == 1
    assert sum(line.startswith("outputs of layers, on the cal") for line in lines) == 1


def test_the_first_words_come_before_torch(tmp_path: Path) -> None:
    """They come after 0.4 s on an idle core; torch alone takes two seconds."""
    command = [sys.executable, "-X", "importtime", "-m", "qplug", "quantize", "qplug:demo"]
    with subprocess.Popen(
        [*command, "--out", tmp_path / "out"], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        imported = []
        for line in process.stderr:
            if line.startswith("opening qplug:demo"):
                break
            imported.append(line.rpartition("|")[2].strip())
        process.kill()
    assert "qplug.cli.run_progress" in imported
    assert not {"torch", "transformers", "numpy"} & {*imported}
