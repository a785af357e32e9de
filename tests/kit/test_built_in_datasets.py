"""The datasets that ship with qplug keep the contract that third parties are held to."""

from __future__ import annotations

from pathlib import Path

import pytest

from qplug.registry.registry import Registry
from qplug.testing import DatasetContract
from qplug_c4.crawl import C4
from qplug_demo.python_text import Demo
from qplug_pileval.pile import PileVal
from qplug_text.text_files import TextFiles
from qplug_wikitext.wikitext2 import WikiText2

PARAGRAPH = "The quick brown fox jumps over the lazy dog, again and again. "


class TestDemo(DatasetContract):
    dataset = Demo


class TestTextFiles(DatasetContract):
    dataset = TextFiles

    @pytest.fixture(autouse=True)
    def _files(self, tmp_path: Path) -> None:
        for number in range(3):
            (tmp_path / f"{number}.txt").write_text(f"{number}. {PARAGRAPH}" * 20)
        self.options = {"path": str(tmp_path)}


class HubContract(DatasetContract):
    """Text of the Hub, from a copy that ``save_to_disk`` wrote."""

    @pytest.fixture(autouse=True)
    def _copy(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
        pages = [f"{number}. {PARAGRAPH * 5}" for number in range(30)]
        datasets.Dataset.from_dict({"text": pages}).save_to_disk(str(tmp_path / "copy"))
        self.options = {"path": str(tmp_path / "copy")}


class TestC4(HubContract):
    dataset = C4


class TestPileVal(HubContract):
    dataset = PileVal


class TestWikiText2(HubContract):
    dataset = WikiText2


def test_every_dataset_has_one() -> None:
    """Nothing ships that is not held to it."""
    kinds = [*DatasetContract.__subclasses__(), *HubContract.__subclasses__()]
    here = [kind for kind in kinds if kind.__module__ == __name__ and hasattr(kind, "dataset")]
    held = {kind.dataset.name for kind in here}
    assert held >= set(Registry.installed(only_shipped=True).datasets)
