"""The plugins on pages keep the contracts that qplug's own components are held to."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file

from qplug import Registry
from qplug.registry.plugin import Plugin
from qplug.testing import AlgorithmContract, DatasetContract, ExporterContract, ReaderContract

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Page
    from torch import Tensor

    from qplug import Algorithm, Component, Dataset, Exporter, Reader


def offers(page: Page, folder: Path) -> list[type[Component[Any]]]:
    """Returns the components that plugins on ``page`` offer; their files go to ``folder``."""
    page.write_files(folder)
    titles = [block.title for block in page.blocks if block.title and "@hookimpl" in block.code]
    registry = Registry([Plugin.of_file(folder / title) for title in titles]).load()
    errors = {plugin.name: plugin.error for plugin in registry.plugins if plugin.error}
    assert not errors
    return [offer for plugin in registry.plugins for offer in plugin.offers.values()]


class OnPage:
    """A contract on the component that plugins on ``where`` offer, or the one called ``called``."""

    where: ClassVar[str]
    called: ClassVar[str | None] = None

    @pytest.fixture(autouse=True)
    def _take_from_page(
        self, named_pages: dict[str, Page], tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        (self.offered,) = (
            offer
            for offer in offers(named_pages[self.where], tmp_path_factory.mktemp("page"))
            if self.called in (None, offer.name)
        )

    def component(self) -> Any:
        return self.offered


class AlgorithmOnPage(OnPage, AlgorithmContract):
    @property
    def algorithm(self) -> type[Algorithm[Any]]:
        return self.component()


class DatasetOnPage(OnPage, DatasetContract):
    @property
    def dataset(self) -> type[Dataset[Any]]:
        return self.component()


class ExporterOnPage(OnPage, ExporterContract):
    @property
    def exporter(self) -> type[Exporter[Any]]:
        return self.component()


class ReaderOnPage(OnPage, ReaderContract):
    @property
    def reader(self) -> Reader:  # type: ignore[override]
        return self.component()


class TestMyIdea(AlgorithmOnPage):
    where = "README.md"


class TestClipped(AlgorithmOnPage):
    where = "docs/tutorial.md"


class TestPeaks(AlgorithmOnPage):
    where = "docs/how-to/write-an-algorithm.md"


@pytest.mark.slow
class TestLearnedClips(AlgorithmOnPage):
    where = "docs/how-to/idea-to-paper.md"


class TestLetters(DatasetOnPage):
    where = "docs/how-to/write-a-dataset.md"


class TestPlain(ExporterOnPage):
    where = "docs/how-to/write-an-exporter.md"
    called = "plain"


class TestHouse(ExporterOnPage):
    where = "docs/how-to/write-an-exporter.md"
    called = "house"
    served = ("W8A8", None)

    def model(self, folder: Path) -> str:
        return "qplug:demo"  # the kernels of the house take no matrix as narrow as the kit's


class TestBytes(ReaderOnPage):
    where = "docs/how-to/write-a-reader.md"

    def write(self, folder: Path) -> dict[str, Tensor]:
        codes = torch.arange(-8, 8, dtype=torch.int8).view(4, 4)
        scales, norm = torch.rand(4, 1), torch.ones(4, dtype=torch.bfloat16)
        tensors = {"q.bytes": codes, "q.scales": scales, "norm.weight": norm}
        save_file(tensors, folder / "model.safetensors")
        told = {"dtype": "bfloat16", "quantization_config": {"quant_method": "bytes"}}
        (folder / "config.json").write_text(json.dumps(told))
        return {"q.weight": (codes.float() * scales).bfloat16(), "norm.weight": norm}


def test_every_component_on_a_page_has_one(
    named_pages: dict[str, Page], tmp_path_factory: pytest.TempPathFactory
) -> None:
    held = {
        contract.where
        for kind in (AlgorithmOnPage, DatasetOnPage, ExporterOnPage, ReaderOnPage)
        for contract in kind.__subclasses__()
    }
    with_one = {
        name for name, page in named_pages.items() if offers(page, tmp_path_factory.mktemp("page"))
    }
    assert held == with_one
