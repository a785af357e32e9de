"""After a power cut or a kill at any moment the same command writes the same bytes."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
from power_cut import Log
from small_runs import contents, is_sound, make_source, run

from qplug.errors import QplugError

ORDERS = 200


class Cuts:
    """Runs, cut at any operation, that write OUT or replace a model there."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._patch = folder, monkeypatch
        monkeypatch.setattr(os, "fsync", lambda _: None)  # nobody cuts the power of this machine
        whole = folder / "whole"
        whole.mkdir()
        make_source(whole / "source")
        shutil.copytree(whole, folder / "old")
        run(whole)
        run(folder / "old", factor=3.0)
        self.new, self.old = contents(whole / "out"), contents(folder / "old" / "out")
        self.logs = {}
        for overwrite in (False, True):
            root = folder / f"run-{overwrite}"
            shutil.copytree(folder / "old", root)
            if not overwrite:
                shutil.rmtree(root / "out")
            log = self.logs[overwrite] = Log(root)
            with log.recording(monkeypatch):
                run(root, overwrite=overwrite)
            assert contents(root / "out") == self.new

    def check(self, root: Path, *, overwrite: bool, is_done: bool = False) -> None:
        """The state in ``root`` is sound, and so is the result of the same command."""
        if (root / "out").exists() and is_sound(root / "out"):
            assert contents(root / "out") in (self.new, self.old)
        if overwrite:  # the old model is where it was, or is kept
            places = (root / "out", root / ".out.partial" / "replaced")
            assert any(contents(place) in (self.new, self.old) for place in places)
        if is_done:
            assert contents(root / "out") == self.new
        told = run_or_refusal(root, overwrite=overwrite)
        assert told in ("", f"{root / 'out'}: exists; choose another folder, or pass --overwrite")
        assert not (told and overwrite)
        assert is_sound(root / "out")
        assert contents(root / "out") == self.new
        assert {path.name for path in root.iterdir()} == {"source", "out"}
        shutil.rmtree(root)


def run_or_refusal(root: Path, *, overwrite: bool) -> str:
    """Runs; returns "", or the line in which the run was refused."""
    try:
        run(root, overwrite=overwrite)
    except QplugError as error:
        return str(error)
    return ""


@pytest.fixture
def cuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cuts:
    return Cuts(tmp_path, monkeypatch)


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_after_every_operation(overwrite: bool, cuts: Cuts, tmp_path: Path) -> None:
    log = cuts.logs[overwrite]
    for count in range(len(log.ops) + 1):
        log.killed(count, tmp_path / "state")
        cuts.check(tmp_path / "state", overwrite=overwrite, is_done=count == len(log.ops))
    assert count > 70


@pytest.mark.parametrize("overwrite", [False, True])
def test_every_order_of_writes(overwrite: bool, cuts: Cuts, tmp_path: Path) -> None:
    log = cuts.logs[overwrite]
    for seed in range(ORDERS // 2):
        rng = random.Random(seed)
        # The end matters most: it is where names change.
        first = rng.choice([0, len(log.ops) * 2 // 3])
        count = rng.randint(first, len(log.ops))
        log.cut(count, rng, tmp_path / "state")
        cuts.check(tmp_path / "state", overwrite=overwrite, is_done=count == len(log.ops))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_finished_folder_survives_every_cut(overwrite: bool, cuts: Cuts, tmp_path: Path) -> None:
    log = cuts.logs[overwrite]
    for seed in range(20):
        log.cut(len(log.ops), random.Random(seed), tmp_path / "state")
        cuts.check(tmp_path / "state", overwrite=overwrite, is_done=True)


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
def test_cut_and_cut_again(
    overwrite: bool, cuts: Cuts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = cuts.logs[overwrite]
    for seed in range(1000):
        rng = random.Random(seed)
        log.cut(rng.randint(0, len(log.ops)), rng, tmp_path / "first")
        again = Log(tmp_path / "first")
        with again.recording(monkeypatch):
            run_or_refusal(tmp_path / "first", overwrite=overwrite)
        again.cut(rng.randint(0, len(again.ops)), rng, tmp_path / "state")
        cuts.check(tmp_path / "state", overwrite=overwrite)
        shutil.rmtree(tmp_path / "first")
