"""Two hosts share a run by torchrun's own rendezvous: here two agents that meet on loopback."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from starter import free_port

import qplug

pytestmark = pytest.mark.slow

Family = Callable[..., Path]
#: Starts torchrun on a host, with the command line of qplug: ``agent(host, words)``.
Agent = Callable[[Path, list[str]], "subprocess.Popen[str]"]

#: Seconds that two agents may take to the end of a run, imports included.
PATIENCE = 240


def hosts(tmp_path: Path, family: Family) -> tuple[Path, Path]:
    """Two folders, which stand for two hosts without a common disk: each has the model."""
    text = " ".join(f"The number {i} is followed by {i + 1}." for i in range(60))
    folders = tmp_path / "first", tmp_path / "second"
    for folder in folders:
        folder.mkdir()
        shutil.copytree(family("qwen3-moe"), folder / "model")
        (folder / "text.txt").write_text(text)
    return folders


@pytest.fixture
def agent() -> Iterator[Agent]:
    port, started = free_port(), list[subprocess.Popen[str]]()

    def start(host: Path, words: list[str]) -> subprocess.Popen[str]:
        launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        launch += ["--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-id", "run"]
        launch += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
        launch += ["--rdzv-conf", "read_timeout=300,timeout=300"]  # a busy machine starts slowly
        run = subprocess.Popen(
            [*launch, "-m", "qplug", *words],
            cwd=host,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(run)
        return run

    yield start
    for run in started:
        if run.poll() is None:
            run.send_signal(signal.SIGTERM)  # torchrun ends its workers
            run.communicate()


WORDS = ["quantize", "model", "--algo", "awq+gptq", "--backend", "compressed-tensors"]
WORDS += ["--group-size", "16", "--dataset", "text", "--dataset-opt", "path=text.txt"]
WORDS += ["--samples", "8", "--seq-len", "20", "--device", "cpu", "-o", "awq.ratios=3"]
WORDS += ["--out", "out"]


def ends(runs: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """How ``runs`` ended: their exit codes, and what they printed."""
    give_up, found = time.monotonic() + PATIENCE, []
    for run in runs:
        out, err = run.communicate(timeout=give_up - time.monotonic())
        found.append((run.returncode, out, err))
    return found


def test_two_hosts_write_one_folder(tmp_path: Path, family: Family, agent: Agent) -> None:
    first, second = hosts(tmp_path, family)
    runs = [agent(host, WORDS) for host in (first, second)]
    found = ends(runs)
    assert [code for code, *_ in found] == [0, 0], found
    # torchrun chooses the host of rank 0, which alone prints and writes.
    printed = ["layers, " in out for _, out, _ in found]
    written = [{path.name for path in host.iterdir()} for host in (first, second)]
    assert sorted(printed) == [False, True]
    assert written == [{"model", "text.txt"} | ({"out"} if prints else set()) for prints in printed]
    result = (first, second)[printed.index(True)] / "out"
    assert qplug.verify(str(result)).ok
