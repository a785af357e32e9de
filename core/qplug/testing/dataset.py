"""The contract of datasets."""

from __future__ import annotations

import socket
from itertools import islice
from typing import Any, ClassVar, NoReturn

import pytest
import torch
from torch import Tensor

from qplug.api import Conversation, Dataset, Split
from qplug.errors import QplugError
from qplug.testing.checking import ComponentContract, demand, demanding
from qplug.testing.models import ByteTokenizer
from qplug.text.conversations import Renderer
from qplug.text.drawing import draw

_SPLITS: tuple[Split, ...] = ("calibration", "evaluation")
#: Tokens of a sample, number of samples, and the number of documents to look at.
_LENGTH, _COUNT, _DOCUMENTS = 16, 8, 50


class DatasetContract(ComponentContract):
    """The tests of a dataset: ``class TestMine(DatasetContract): dataset = Mine``.

    ``options`` must name text that can be read without a network, such as a file of the tests.
    ``random`` is False for a dataset that gives the same samples for every seed.
    """

    dataset: ClassVar[type[Dataset[Any]]]
    random: ClassVar[bool] = True

    def component(self) -> type[Dataset[Any]]:
        return self.dataset

    @pytest.fixture(autouse=True)
    def _no_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> NoReturn:
            raise OSError("there is no network in this test")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)

    def test_documents_are_text_in_one_order(self) -> None:
        for split in _SPLITS:
            first, second = (self._documents(split) for _ in range(2))
            demand(any(map(_says_something, first)), f"{self._who}: no text in {split!r}")
            kind = Conversation if isinstance(first[0], Conversation) else str
            demand(
                all(isinstance(text, kind) for text in first),
                f"{self._who}.documents must give strings alone, or conversations alone",
            )
            demand(
                first == second,
                f"{self._who}.documents({split!r}) changes its order from call to call: sort the "
                "files of a folder and the items of a set",
            )

    def test_samples_are_as_asked_for(self) -> None:
        samples = self._samples(0)
        demand(
            len(samples) == _COUNT,
            f"{self._who}.samples must give {_COUNT} samples, and gave {len(samples)}",
        )
        for sample in samples:
            demand(
                isinstance(sample, Tensor) and sample.dtype == torch.int64 and sample.ndim == 1,
                f"{self._who}.samples must give int64 tensors of one axis",
            )
            demand(
                0 < len(sample) <= _LENGTH,
                f"{self._who}.samples gave a sample of {len(sample)} tokens, not of 1 to {_LENGTH}",
            )
            demand(
                int(sample.min()) >= 0 and int(sample.max()) < ByteTokenizer.size,
                f"{self._who}.samples gave tokens that the tokenizer does not have: use the "
                "tokenizer that is passed",
            )

    def test_the_seed_decides(self) -> None:
        first, repeated, reseeded = self._samples(0), self._samples(0), self._samples(1)
        demand(
            _equal(first, repeated),
            f"{self._who}.samples: the same seed must give the same samples",
        )
        demand(
            not self.random or not _equal(first, reseeded),
            f"{self._who}.samples ignores the seed; if that is intended, set random = False",
        )

    def test_without_text_it_says_so(self) -> None:
        """Without a network and with default options, it works or raises a QplugError."""
        try:
            dataset = self.dataset(self.dataset.Params())
        except TypeError:
            return  # it has a parameter that users must give
        with demanding(f"{self._who}: without a network, raise a QplugError that says what to do"):
            try:
                next(iter(dataset.documents("calibration")))
            except QplugError as error:
                demand(str(error).strip(), f"{self._who}: its QplugError says nothing")

    @property
    def _who(self) -> str:
        return self.dataset.__qualname__

    def _documents(self, split: Split) -> list[str | Conversation]:
        dataset: Dataset[Any] = self.make()
        with demanding(f"{self._who}.documents({split!r}) fails"):
            return list(islice(dataset.documents(split), _DOCUMENTS))

    def _samples(self, seed: int) -> list[Tensor]:
        dataset: Dataset[Any] = self.make()
        with demanding(f"{self._who}.samples fails"):
            render = Renderer(ByteTokenizer())
            drawn = draw(dataset, render, "dataset", length=_LENGTH, count=_COUNT, seed=seed)
            return [sample.tokens for sample in drawn]


def _says_something(document: str | Conversation) -> bool:
    return bool(document.messages if isinstance(document, Conversation) else document.strip())


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    pairs = zip(first, second, strict=False)
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in pairs)
