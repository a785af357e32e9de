"""The model card of a result: what the Hub reads of it, and what it keeps to itself."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import qplug
from qplug.checkpoint.locate import find_model
from qplug.output.card import with_quality
from qplug.output.measured import Measured
from qplug.output.origins import hub_name, public_name, public_values


def card_of(folder: Path) -> Any:
    return ModelCard((folder / "README.md").read_text())


def test_the_head_of_a_card(llama: Path, tmp_path: Path) -> None:
    (llama / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage:\n- en\ntags: [chat]\nbase_model: a/b\n---\n# Mine\n"
    )
    out = tmp_path / "out"
    qplug.quantize(str(llama), out, group_size=32, backend="vllm", device="cpu")
    card = card_of(out)
    assert card.data.to_dict() == {
        "language": ["en"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["qplug", "w4a16", "compressed-tensors", "vllm"],
    }
    assert "serve it with `vllm serve .`" in card.text


@pytest.mark.parametrize(
    "head", ["---\n- x\n---\n", "---\n{:\n---\n", "", "---\nlicense: [a]\n---\n"]
)
def test_a_strange_card_says_nothing(head: str, llama: Path, tmp_path: Path) -> None:
    (llama / "README.md").write_text(head)
    qplug.quantize(str(llama), tmp_path / "out", group_size=32, device="cpu")
    assert "license" not in card_of(tmp_path / "out").data.to_dict()


def test_a_model_of_the_hub_is_the_base(llama: Path, tmp_path: Path) -> None:
    """The folder is one of the Hub's cache."""
    snapshots = tmp_path / "models--some-org--Some-Model.v1" / "snapshots"
    snapshots.mkdir(parents=True)
    source = Path(shutil.copytree(llama, snapshots / ("0a" * 20)))
    qplug.quantize(str(source), tmp_path / "out", group_size=32, device="cpu")
    data = card_of(tmp_path / "out").data
    assert (data.base_model, data.base_model_relation) == ("some-org/Some-Model.v1", "quantized")
    assert "# Some-Model.v1, W4A16" in (tmp_path / "out/README.md").read_text()


def test_a_mix_names_its_schemes(llama: Path, tmp_path: Path) -> None:
    words: Any = {"group_size": 32, "device": "cpu", "ignore": ["*.1.*o_proj"]}
    overrides = {"*down_proj": "W8A16", "*.0.*v_proj": "W8A16", "*.0.*q_proj": "W8A16"}
    overrides["*.0.*k_proj"] = "W8A16"
    qplug.quantize(str(llama), tmp_path / "out", overrides=overrides, **words)
    text = card_of(tmp_path / "out").text
    assert "# llama, mixed precision" in text
    (line,) = (line for line in text.splitlines() if line.startswith("A mix of schemes"))
    assert re.search(r"\d+ % `W4A16 g32`, \d+ % `W8A16 .*`, \d+ % float\.", line), line


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/mine").mkdir(parents=True)
    (tmp_path / "link").symlink_to("models/mine")
    names = ("/data/llama/", "~/llama", "./link", "models/mine", "org/name", "qplug:demo", "text:3")
    assert [*map(public_name, names)] == [
        *("llama", "llama", "link", "mine", "org/name", "qplug:demo", "text:3"),
    ]
    assert public_name(".") == tmp_path.name
    told = {"options": {"path": "/home/me/notes.txt", "n": 3}, "ignore": ["re:.*"]}
    assert public_values(told) == {"options": {"path": "notes.txt", "n": 3}, "ignore": ["re:.*"]}
    assert hub_name("org/name", {}) == "org/name"
    assert hub_name("models/mine", {}) is None
    assert hub_name("/data/llama", {"_name_or_path": "org/name"}) == "org/name"
    assert hub_name("/data/llama", {"_name_or_path": "/data/llama"}) is None
    assert hub_name("/data/llama", {"_name_or_path": "a b/c: d"}) is None


@pytest.mark.slow
def test_no_path_of_this_machine_is_in_the_folder(
    tmp_path: Path,
) -> None:
    source = Path(shutil.copytree(find_model("qplug:demo"), tmp_path / "here" / "llama"))
    (text := tmp_path / "here" / "notes.txt").write_text(
        "A list can be changed, a tuple not. " * 99
    )
    out = tmp_path / "there" / "out"
    qplug.quantize(
        str(source),
        out,
        algo="gptq",
        backend="fake",
        dataset="text",
        dataset_options={"path": str(text)},
        samples=2,
        seq_len=16,
        device="cpu",
    )
    for path in out.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path
    found = qplug.verify(str(out))
    assert found.ok
    assert found.against == str(source)  # noted for the user alone
    moved = out.rename(tmp_path / "moved")
    assert qplug.verify(str(moved)).against == str(source)
    source.rename(tmp_path / "elsewhere")
    gone = qplug.verify(str(moved))
    assert (gone.against, gone.missing) == (None, "llama")


def test_quality_in_a_card() -> None:
    card = "---\nlibrary_name: transformers\n---\n# Name\n\nText.\n"
    measured = Measured(
        "8 windows of 64 tokens of demo", 21.0, 20.0, 0.0123, "noticeable", "So so."
    )
    once = with_quality(card, measured, "name")
    assert once.endswith(
        "Text.\n\n## Quality\n\nVerdict: noticeable. So so.\n"
        "Perplexity 21.0000, +5.00% against 20.0000 of the float model.\n"
        "Divergence from the float model 0.0123 nats for a token.\n"
        "Measured on 8 windows of 64 tokens of demo.\n"
    )
    assert with_quality(once, measured, "name") == once
    later = with_quality(once, Measured("2 windows of 64 tokens of demo", 22.0), "name")
    assert "21.0000" not in later
    assert ModelCard(later).data.eval_results[0].metric_value == 22.0
