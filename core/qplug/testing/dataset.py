"""What every dataset must keep."""

from __future__ import annotations

import socket
from itertools import islice
from typing import Any, ClassVar, NoReturn

import pytest
import torch
from torch import Tensor

from qplug.api import Dataset, Split
from qplug.errors import QplugError
from qplug.testing.checking import ComponentContract, demand, demanding
from qplug.testing.models import ByteTokenizer
from qplug.text import windows

_SPLITS: tuple[Split, ...] = ("calibration", "evaluation")
_LENGTH, _COUNT, _SOME = 16, 8, 50


class DatasetContract(ComponentContract):
    """Subclass it as ``class TestMine(DatasetContract): dataset = Mine``.

    ``options`` name text that is there without a network: a file that the tests bring, say.
    ``random``: whether samples are drawn by the seed, or always the same ones.
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
            first, again = (self._documents(split) for _ in range(2))
            demand(any(text.strip() for text in first), f"{self._who}: no text in {split!r}")
            demand(
                all(isinstance(text, str) for text in first),
                f"{self._who}.documents must give strings",
            )
            demand(
                first == again,
                f"{self._who}.documents({split!r}) gives another order each time: sort what a "
                "folder or a set gives",
            )

    def test_samples_are_as_asked_for(self) -> None:
        samples = self._samples(0)
        demand(
            len(samples) == _COUNT,
            f"{self._who}.samples must give {_COUNT} of them, and gave {len(samples)}",
        )
        for sample in samples:
            demand(
                isinstance(sample, Tensor) and sample.dtype == torch.int64 and sample.ndim == 1,
                f"{self._who}.samples must give int64 tensors of one axis",
            )
            demand(
                0 < len(sample) <= _LENGTH,
                f"{self._who}.samples gave one of {len(sample)} tokens, {_LENGTH} were asked for",
            )
            demand(
                int(sample.min()) >= 0 and int(sample.max()) < ByteTokenizer.size,
                f"{self._who}.samples gave tokens that the tokenizer does not have: tokenise by "
                "the one that is given",
            )

    def test_the_seed_decides(self) -> None:
        one, again, other = self._samples(0), self._samples(0), self._samples(1)
        demand(
            _equal(one, again),
            f"{self._who}.samples: the same seed must give the same samples",
        )
        demand(
            not self.random or not _equal(one, other),
            f"{self._who}.samples ignores the seed; if it is meant to, say random = False",
        )

    def test_without_text_it_says_so(self) -> None:
        """With the network off and nothing at hand, it works or says what is missing."""
        kind = self.dataset
        try:
            made = kind(kind.Params())
        except TypeError:
            return  # it has a parameter that users must give
        with demanding(f"{self._who}: without a network, raise a QplugError that says what to do"):
            try:
                next(iter(made.documents("calibration")))
            except QplugError as error:
                demand(str(error).strip(), f"{self._who}: its QplugError says nothing")

    @property
    def _who(self) -> str:
        return self.dataset.__qualname__

    def _documents(self, split: Split) -> list[str]:
        made: Dataset[Any] = self.make()
        with demanding(f"{self._who}.documents({split!r}) fails"):
            return list(islice(made.documents(split), _SOME))

    def _samples(self, seed: int) -> list[Tensor]:
        made: Dataset[Any] = self.make()
        with demanding(f"{self._who}.samples fails"):
            return list(
                windows.sample(
                    made, ByteTokenizer(), "dataset", length=_LENGTH, count=_COUNT, seed=seed
                )
            )


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in pairs)
