"""``qplug push``: a folder and its card reach the Hub, and what goes wrong is said in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hub import TOKEN
from huggingface_hub import ModelCard, constants

import qplug

if TYPE_CHECKING:
    from click.testing import Result
    from hub import Hub

    Cli = Callable[..., Result]

#: huggingface_hub gives its HTTP library files by an older keyword.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("push") / "demo-w4"
    qplug.quantize("qplug:demo", out, backend="vllm", device="cpu")
    return out


@pytest.fixture
def out(quantized: Path, tmp_path: Path) -> Path:
    return shutil.copytree(quantized, tmp_path / "demo-w4")


@pytest.fixture
def at_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """``huggingface_hub`` in this process talks to the stand-in, with the token that may write."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def test_every_file_arrives(out: Path, at_the_hub: Hub, cli: Cli) -> None:
    for name in (".secret", ".cache/x", "model.safetensors.partial"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("not for others")
    result = cli("push", out, "me/demo-w4", "--private", "--commit-message", "First")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{at_the_hub.url}/me/demo-w4\n"
    assert "says nothing of quality" in result.stderr
    wanted = {
        path.name: path.read_bytes()
        for path in out.iterdir()
        if path.is_file() and not path.name.startswith(".") and path.suffix != ".partial"
    }
    assert at_the_hub.files["me/demo-w4"] == wanted
    assert "model.safetensors" in wanted
    assert at_the_hub.private == {"me/demo-w4": True}
    assert at_the_hub.commits == [("me/demo-w4", "First")]


def test_the_report_adds_quality_to_the_card(out: Path, at_the_hub: Hub, cli: Cli) -> None:
    words = ("--perplexity", "--windows", 2, "--seq-len", 32, "--device", "cpu")
    assert cli("report", out, *words).exit_code == 0
    for again in (False, True):  # a second push replaces, and changes nothing
        result = cli("push", out, "me/demo-w4")
        assert result.exit_code == 0, result.output
        assert ("has the quality of" in result.stderr) is not again
    card = ModelCard(at_the_hub.files["me/demo-w4"]["README.md"].decode())
    (found,) = card.data.eval_results
    assert (found.metric_type, found.dataset_name) == ("perplexity", "demo, 2 windows of 32 tokens")
    told = f"Perplexity {found.metric_value:.4f}, "
    assert card.text.count("## Quality") == card.text.count(told) == 1
    assert qplug.verify(str(out)).ok  # its checksums are right


@pytest.mark.slow
def test_the_report_of_another_folder_is_refused(out: Path, at_the_hub: Hub, cli: Cli) -> None:
    words = ("--perplexity", "--windows", 1, "--seq-len", 32, "--device", "cpu")
    assert cli("report", out, *words).exit_code == 0
    told = json.loads((out / "qplug.json").read_text())
    other = out.with_name("other")
    qplug.quantize("qplug:demo", other, backend="vllm", scheme="W8A16", device="cpu")
    page = out.with_name("demo-w4.report.html")
    result = cli("push", other, "me/other", "--report", page)
    assert result.exit_code == 1
    assert f"{page}: is on another folder" in result.stderr
    assert at_the_hub.files == {}
    assert json.loads((out / "qplug.json").read_text()) == told


@pytest.mark.parametrize(
    ("refuses", "complaint"),
    [
        (401, "the Hub does not know the token; log in with hf auth login, or set HF_TOKEN"),
        (403, "the token may not write there; choose your own name"),
        (500, "the Hub answers with status 500; try again later"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    refuses: int, complaint: str, out: Path, at_the_hub: Hub, cli: Cli
) -> None:
    at_the_hub.refuses = refuses
    result = cli("push", out, "me/demo-w4")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(
        f"Error: me/demo-w4: not uploaded: {complaint}"
    )
    assert "http" not in result.stderr.lower()


def test_no_token_and_no_network(
    out: Path, at_the_hub: Hub, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    result = cli("push", out, "me/demo-w4")
    assert result.stderr.splitlines()[-1] == (
        "Error: me/demo-w4: not uploaded: the Hub cannot be reached; check the network"
    )
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(out / "nowhere"))
    result = cli("push", out, "me/demo-w4")
    assert "log in with hf auth login, set HF_TOKEN, or pass --token" in result.stderr
    assert cli("push", out, "me/demo-w4", "--token", "wrong").exit_code == 1


def test_what_is_refused_before_the_hub_is_asked(out: Path, at_the_hub: Hub, cli: Cli) -> None:
    assert "no such folder" in cli("push", out / "gone", "me/demo").stderr
    assert "has a name like user/model" in cli("push", out, "demo").stderr
    assert "is not quantized" in cli("push", "core/qplug/demo", "me/demo").stderr
    (out / "tokenizer.json").unlink()
    result = cli("push", out, "me/demo")
    assert "not uploaded: damaged: tokenizer.json: has a checksum in qplug.json" in result.stderr
    assert at_the_hub.files == {}


@pytest.mark.slow
def test_a_process_of_its_own_with_an_endpoint(out: Path, hub: Hub) -> None:
    """As users set it up: the address of the Hub is in HF_ENDPOINT."""
    chosen = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "qplug", "push", str(out), "me/demo-w4"],
        env={**{k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}, **chosen},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"{hub.url}/me/demo-w4\n"
    assert hub.files["me/demo-w4"].keys() >= {"README.md", "config.json", "model.safetensors"}
