"""A small model, quantized in two ways, and a reader for pages."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import qplug
from qplug.checkpoint.locate import find_model

HOW: dict[str, Any] = {
    "group_size": 32,
    "backend": "compressed-tensors",
    "samples": 4,
    "seq_len": 32,
    "device": "cpu",
}


@pytest.fixture(scope="session")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in float32, three blocks, with the demo model's tokenizer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("float") / "llama"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(find_model("qplug:demo") / name, folder)
    return folder


@pytest.fixture(scope="session")
def rtn(float_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rtn") / "llama-rtn"
    qplug.quantize(str(float_model), out, **HOW)
    return out


@pytest.fixture(scope="session")
def awq(float_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("awq") / "llama-awq"
    options = {"awq": {"ratios": "4", "clip_steps": "4"}}
    qplug.quantize(str(float_model), out, algo="awq", algorithm_options=options, **HOW)
    return out


class Page(HTMLParser):
    """The elements of a page with their attributes, its text, and the rows of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._in_cell = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        self._in_cell = tag in ("th", "td")
        if self._in_cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("th", "td"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell:
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        """What stands behind ``first`` in the first row that begins with it."""
        return next(cells[1:] for cells in self.rows if cells and cells[0] == first)


@pytest.fixture(scope="session")
def read_page() -> Callable[[str], Page]:
    return Page
