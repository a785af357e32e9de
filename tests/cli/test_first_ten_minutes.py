"""A stranger's first ten minutes, typed in order in an empty folder, and what must be seen.

Each command is a process of its own, as in a terminal that is no terminal: plain lines.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


class Shell:
    """Types commands in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith("QPLUG_")}
        self._environment["HF_HUB_OFFLINE"] = "1"

    def __call__(self, line: str, exit_code: int = 0) -> str:
        """What ``qplug LINE`` prints on both streams, stdout first."""
        done = subprocess.run(
            [sys.executable, "-m", "qplug", *line.split()],
            cwd=self._folder,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        said = done.stdout + done.stderr
        assert done.returncode == exit_code, said
        assert "Traceback" not in said
        return said


def test_a_stranger_sees_what_to_do_next(tmp_path: Path) -> None:
    qplug = Shell(tmp_path)

    # Minute 0: what is there?
    said = qplug("--help")
    for word in ("quantize", "verify", "serve", "eval", "schemes", "plugins", "doctor"):
        assert re.search(rf"^  {word} ", said, re.MULTILINE), word
    said = qplug("plugins list")
    for word in ("gptq", "awq", "vllm", "sglang", "demo"):
        assert word in said
    assert "W4A16" in qplug("schemes")

    # Minute 1: mistakes are one line, with the way out, and nothing is left behind.
    assert "Did you mean 'quantize'" in qplug("quantise qplug:demo", 2)
    assert "Did you mean" in qplug("quantize qplug:demo --scheme W4A61 --out out", 1)
    assert "Did you mean 'vllm'" in qplug("quantize qplug:demo --backend vlm --out out", 1)
    assert "--out" in qplug("quantize qplug:demo", 2)
    assert "pass the path of a folder" in qplug("quantize no/such-model --out out", 1)
    said = qplug("quantize qplug:demo --device cuda:99 --out out", 1)
    assert "--device cpu" in said or "there are cuda:0" in said
    assert "Torch not compiled" not in said
    assert list(tmp_path.iterdir()) == []

    # Minute 2: what would it do? Then it does it.
    words = "quantize qplug:demo --samples 8 --seq-len 128 --out out"
    said = qplug(f"{words} --dry-run")
    assert "out: would be written: 8.4 MB -> 3.7 MB" in said
    assert "--algo gptq: chosen for W4A16" in said
    plan = re.search(
        r"qplug:demo \(LlamaForCausalLM, 4\.2 million parameters, 4 blocks\) becomes W4A16 by gptq "
        r"for sglang: .+ It calibrates on 8 windows of 128 tokens of demo\. .+ it takes about .+ "
        r"of memory, and .+ on disk",
        said,
    )
    assert plan is not None, said
    assert list(tmp_path.iterdir()) == []
    said = qplug(words)
    for line in (
        "opening qplug:demo",
        plan[0],
        "outputs of layers, on the calibration data, differ from float by ",
        "checking",
        "next: qplug verify out",
        "qplug serve out",
        "qplug report out",
    ):
        assert line in said, line
    assert re.search(
        r"^quality: (good|noticeable|broken); perplexity [\d.]+ \(float [\d.]+, \+[\d.]+%\), KL "
        r"divergence 0\.\d+ nats a token, on 8 windows of 256 tokens of demo that calibration",
        said,
        re.MULTILINE,
    )

    # Minute 5: the commands that it named, and a mistake: the folder is there already.
    assert "exists; choose another folder, or pass --overwrite" in qplug(words, 1)
    assert qplug("verify out").startswith("sound: 28 quantized layers, as sglang loads them")
    assert "python" in qplug("serve out --dry-run")
    assert re.search(r"out: perplexity [\d.]+ \(8 windows of 512", qplug("eval out --windows 8"))
    assert "report in " in qplug("report out")
    assert "out.report.html" in {path.name for path in tmp_path.iterdir()}

    # Minute 8: eight bits for vLLM, which need no data and lose less; then both side by side.
    said = qplug("quantize qplug:demo --scheme fp8 --backend vllm --report --out eight")
    assert "fp8 is the scheme FP8_DYNAMIC" in said
    assert "quality: good; " in said
    assert re.search(r"^ +open \S*eight.report.html$", said, re.MULTILINE)
    said = qplug("compare out eight")
    assert "W4A16" in said
    assert "FP8_DYNAMIC" in said
