"""``qplug serve``, ``qplug verify --engine`` and the examples, with the real vLLM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from real_engines import VLLM_ON_CPU

import qplug
from qplug.machine.session import Session
from qplug.reading.engine import check_engine, free_port, post_json, serve
from qplug.reading.server import find_serving

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.engine

EXAMPLES = Path(__file__).parents[2] / "examples"
#: What comes after this, the demo model is sure about: bfloat16 makes no difference.
TEXT = """The *format_spec* argument is a string that contains a
   description of the formatting options desired. The interpretation
   of the *format_spec"""
TOKENS = 4
SMALL = ("--max-model-len", "256", "--max-num-seqs", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("served") / "demo-w8a8"
    return qplug.quantize("qplug:demo", out, scheme="W8A8", backend="vllm").out


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> str:
    """The Python of vLLM; whatever is started from here starts with its settings."""
    for name, value in VLLM_ON_CPU.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return str(VLLM_ON_CPU.python)


def test_the_server_finds_the_same_probabilities(folder: Path, vllm: str, results: Any) -> None:
    """What ``qplug verify --engine`` does, on the folder that was written for vLLM."""
    found = check_engine(str(folder), python=vllm, arguments=SMALL, windows=4, seq_len=128)
    results.rows.append(
        {
            "case": "qplug verify --engine vllm",
            "difference": round(found.difference, 4),
            "perplexity": round(found.perplexity, 4),
            "qplug eval": round(found.perplexity_read, 4),
        }
    )
    assert found.ok
    assert found.perplexity == pytest.approx(found.perplexity_read, rel=0.02)


@pytest.fixture
def server(folder: Path, vllm: str) -> Iterator[str]:
    from dataclasses import replace

    serving = find_serving(str(folder), Session.alone(), python=vllm, port=free_port())
    words = (*serving.arguments, *serving.server.brief, *SMALL)
    with serve(replace(serving, arguments=words)) as url:
        yield url


def test_it_writes_what_the_reader_would(folder: Path, server: str) -> None:
    prompt, expected = continue_greedily(folder)
    asked = {"model": folder.name, "prompt": TEXT, "max_tokens": TOKENS, "temperature": 0}
    answer = post_json(f"{server}/v1/completions", asked)
    assert answer["usage"]["prompt_tokens"] == prompt
    assert answer["choices"][0]["text"] == expected
    script = EXAMPLES / "serve_with_vllm/ask.py"
    said = subprocess.run(
        [sys.executable, script, "--url", server, TEXT, "--tokens", str(TOKENS)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == expected + "\n"


@torch.inference_mode()
def continue_greedily(folder: Path) -> tuple[int, str]:
    """How many tokens TEXT is, and what qplug's reader finds likeliest to come after it."""
    tokenizer = qplug.load_tokenizer(str(folder))
    tokens = list(tokenizer(TEXT)["input_ids"])
    length = len(tokens)
    model = qplug.load(str(folder))
    for _ in range(TOKENS):
        best = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].topk(2)
        first, second = best.values.tolist()
        assert first - second > 1, "a text whose continuation is less open is needed here"
        tokens.append(int(best.indices[0]))
    return length, str(tokenizer.decode(tokens[length:]))


def test_the_offline_example(folder: Path, vllm: str) -> None:
    script = EXAMPLES / "serve_with_vllm/offline.py"
    said = subprocess.run(
        [vllm, script, folder, TEXT, "--tokens", str(TOKENS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr[-2000:]
    assert continue_greedily(folder)[1] in said.stdout
