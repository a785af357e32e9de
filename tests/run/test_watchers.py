"""Plugins are told of each step and of the end; one that breaks is warned of, and stops nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qplug import BlockReport, PluginWarning, QplugError, Result, RunStart, hookimpl, quantize
from qplug.calibration.live_block import LiveBlock
from qplug.checkpoint.open import open_checkpoint
from qplug.registry.registry import Registry
from qplug.testing import tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result as CliResult
    from torch import Tensor

    Cli = Callable[..., CliResult]

DATA: dict[str, Any] = {"algo": "gptq", "samples": 2, "seq_len": 16, "backend": "fake"}


class Watcher:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.blocks: list[BlockReport] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.results: list[Result] = []
        self.starts: list[RunStart] = []
        self.stages: list[str] = []

    @hookimpl
    def qplug_stage_begun(self, stage: str) -> None:
        self.stages.append(stage)

    @hookimpl
    def qplug_run_begun(self, start: RunStart) -> None:
        assert not self.blocks
        self.starts.append(start)

    @hookimpl
    def qplug_block_done(self, report: BlockReport) -> None:
        assert not self.results
        self.blocks.append(report)
        for name, weight in report.codes.items():
            self.shapes[name] = tuple(weight.codes.shape)

    @hookimpl
    def qplug_run_done(self, result: Result) -> None:
        assert (result.out / "config.json").is_file()
        self.results.append(result)


class Broken:
    """Raises whatever it is given."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.times = error, 0

    @hookimpl
    def qplug_block_done(self, report: BlockReport) -> None:
        self.times += 1
        raise self.error


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def run(model: Path, out: Path, *plugins: object, **options: Any) -> Result:
    registry = Registry.installed()
    for number, plugin in enumerate(plugins):
        registry = registry.with_(plugin, f"plugin-{number}")
    sizes: dict[str, Any] = {"scheme": "W8A16", "group_size": 32, "device": "cpu"}
    return quantize(str(model), out, registry=registry, **{**sizes, **options})


def test_each_tensor_of_a_streamed_run_and_the_end(llama: Path, tmp_path: Path) -> None:
    watcher = Watcher()
    result = run(llama, tmp_path / "out", watcher, backend="compressed-tensors")
    assert watcher.results == [result]
    assert [report.number for report in watcher.blocks] == list(range(1, len(watcher.blocks) + 1))
    assert {report.count for report in watcher.blocks} == {len(watcher.blocks)}
    assert watcher.starts == [RunStart(tmp_path / "out", len(watcher.blocks), 0)]
    told = {name: error for report in watcher.blocks for name, error in report.errors.items()}
    assert told == result.errors
    assert watcher.shapes["model.layers.0.mlp.up_proj"] == (256, 128)
    assert 0 < sum(report.seconds for report in watcher.blocks) <= result.seconds
    assert watcher.stages == ["opening", "blocks", "writing"]
    (start,) = watcher.starts
    assert start.blocks == 2
    assert [start.blocks_after(steps) for steps in (0, start.block_ends[0], start.count)] == [
        *range(3)
    ]
    plan = start.plan
    assert plan is not None
    assert (plan.algorithm, plan.scheme, plan.dataset, plan.blocks) == ("rtn", "W8A16", "", 2)
    tensors = open_checkpoint(llama).tensors.values()
    assert plan.parameters == sum(math.prod(tensor.spec.shape) for tensor in tensors)
    assert len(plan.block_seconds) == 2


def test_each_block_of_a_calibrated_run_with_what_it_held(tiny: Path, tmp_path: Path) -> None:
    watcher = Watcher()
    result = run(tiny, tmp_path / "out", watcher, **DATA)
    blocks = {report.name: report for report in watcher.blocks if report.block is not None}
    assert list(blocks) == ["model.layers.0", "model.layers.1"]
    for report in blocks.values():
        assert report.block is not None
        assert report.loss == pytest.approx(sum(report.losses.values()) / len(report.losses))
        assert [len(group.linears) for group in report.block.groups] == [3, 1, 2, 1]
    assert {name for report in watcher.blocks for name in report.losses} == set(result.losses)
    assert any(report.block is None and report.loss is None for report in watcher.blocks)
    assert watcher.stages == ["opening", "data", "trial pass", "blocks", "writing"]
    plan = watcher.starts[0].plan
    assert plan is not None
    assert (plan.dataset, plan.samples, plan.seq_len) == ("demo", 2, 16)
    assert plan.estimate is not None
    assert 0 < sum(plan.block_seconds) < plan.estimate.seconds


def test_statistics_are_there_for_watchers_and_then_free_their_memory(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes next copies the whole block, for which a GPU may have no room beside them."""
    told: list[int] = []
    kept: list[int] = []
    effective = LiveBlock.effective_parameters

    class Reading:
        @hookimpl
        def qplug_block_done(self, report: BlockReport) -> None:
            if report.block is not None:
                told.extend(group.gram.numel() for group in report.block.groups)

    def watched(self: LiveBlock, *args: Any) -> dict[str, Tensor]:
        kept.extend(group.gram.numel() for group in self.groups)
        return effective(self, *args)

    monkeypatch.setattr(LiveBlock, "effective_parameters", watched)
    run(tiny, tmp_path / "out", Reading(), **DATA)
    assert len(told) == len(kept) == 8
    assert all(told)
    assert not any(kept)


@pytest.mark.parametrize("error", [ValueError("no disk"), SystemExit(3)])
def test_one_that_breaks_stops_nothing(llama: Path, tmp_path: Path, error: BaseException) -> None:
    broken, watcher = Broken(error), Watcher()
    with pytest.warns(PluginWarning, match=r"plugin plugin-0 .*: qplug_block_done: ") as warned:
        run(llama, tmp_path / "out", broken, watcher, backend="fake")
    assert broken.times == 1
    assert len(warned) == 1
    assert type(error).__name__ in str(warned[0].message)
    assert len(watcher.results) == 1


def test_ctrl_c_in_one_is_ctrl_c(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(llama, tmp_path / "out", Broken(KeyboardInterrupt()), backend="fake")


def test_nobody_is_told_of_what_is_not_done(llama: Path, tmp_path: Path) -> None:
    watcher = Watcher()
    run(llama, tmp_path / "out", watcher, dry_run=True, backend="fake")
    assert not watcher.blocks
    assert not watcher.results
    assert not watcher.starts
    assert watcher.stages == ["opening"]
    with pytest.raises(QplugError):
        run(llama, tmp_path / "out", watcher, backend="sglang", group_size=7)
    assert not watcher.results


def test_a_run_that_goes_on_counts_on(llama: Path, tmp_path: Path) -> None:
    stopped, watcher = Broken(KeyboardInterrupt()), Watcher()

    class Later(Broken):
        @hookimpl
        def qplug_block_done(self, report: BlockReport) -> None:
            if report.number == 5:
                raise self.error

    stopped = Later(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(llama, tmp_path / "out", stopped, backend="fake")
    result = run(llama, tmp_path / "out", watcher, backend="fake")
    assert result.resumed
    assert watcher.blocks[0].number == result.resumed + 1
    assert watcher.blocks[-1].number == watcher.blocks[-1].count
    assert watcher.starts == [RunStart(tmp_path / "out", watcher.blocks[-1].count, result.resumed)]


def test_the_command_line_says_it_in_a_line(llama: Path, tmp_path: Path, cli: Cli) -> None:
    plugin = tmp_path / "noisy.py"
    plugin.write_text(
        "from qplug import hookimpl\n"
        "@hookimpl\n"
        "def qplug_run_done(result):\n"
        "    raise OSError('no printer')\n"
    )
    words = (
        "quantize",
        "--algo",
        "rtn",
        llama,
        "--backend",
        "fake",
        "--group-size",
        32,
        "--device",
        "cpu",
    )
    result = cli("--plugin", plugin, *words, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    (line,) = (line for line in result.stderr.splitlines() if "noisy" in line)
    assert line.startswith("Warning: plugin noisy (")
    assert "qplug_run_done: OSError: no printer" in line
    checked = cli("--plugin", plugin, "plugins", "check")
    assert "qplug_run_done" in checked.output


def test_the_plan_names_all_schemes(tiny: Path, tmp_path: Path) -> None:
    words: dict[str, Any] = {"backend": "fake", "dry_run": True, "overrides": {"*.1.*": "FP8"}}
    result = run(tiny, tmp_path / "out", samples=1, seq_len=16, scheme="W8A16", **words)
    assert result.plan is not None
    assert result.plan.scheme == "W8A16 and FP8"
