"""The calibration samples of a run, and the batches of them that pass through a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from qplug.text.conversations import Sample


@dataclass(frozen=True, eq=False)
class Samples:
    """Tokens, int64 ``[samples, length]``, padded on the right with -1.

    ``mask``, bool ``[samples, length]``, is false for padding and for tokens that statistics leave
    out, which blocks see nevertheless; None if only padding is left out. ``extra`` are further
    inputs of the model for each sample, such as pixels, by the name of the argument; empty if no
    sample has any.
    """

    tokens: Tensor
    mask: Tensor | None = None
    extra: tuple[Mapping[str, Tensor], ...] = ()

    @classmethod
    def of(cls, drawn: Sequence[Sample]) -> Samples:
        """The ``drawn`` samples, in the same order."""
        tokens = pad_sequence([s.tokens for s in drawn], batch_first=True, padding_value=-1)
        mask = None
        if any(sample.counted is not None for sample in drawn):
            masks = [
                torch.ones(len(s.tokens), dtype=torch.bool) if s.counted is None else s.counted
                for s in drawn
            ]
            mask = pad_sequence(masks, batch_first=True, padding_value=False)
        extra = tuple(sample.extra for sample in drawn) if any(s.extra for s in drawn) else ()
        return cls(tokens, mask, extra)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def length(self) -> int:
        """The number of tokens of a sample, with its padding."""
        return self.tokens.shape[1]

    @property
    def real(self) -> Tensor | None:
        """False for padding, bool ``[samples, length]``; None if there is none."""
        real = self.tokens >= 0
        return None if real.all() else real

    @property
    def counted(self) -> Tensor | None:
        """True for the tokens of statistics, bool ``[samples, length]``; None if all count."""
        return self.real if self.mask is None else self.mask

    @property
    def count(self) -> int:
        """The number of tokens that statistics count."""
        counted = self.counted
        return self.tokens.numel() if counted is None else int(counted.sum())

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The arguments of the model for this batch, floats in ``dtype``."""
        inputs = {"input_ids": self.tokens.clamp(min=0)}
        for extra in self.extra:  # a sample with extra inputs is a batch of its own
            for name, value in extra.items():
                inputs[name] = value.to(dtype) if value.is_floating_point() else value
        return inputs

    def first(self, count: int) -> Samples:
        """The first ``count`` samples, or all if there are fewer."""
        return self._some(range(min(count, len(self))))

    def shared_by(self, processes: int) -> list[Samples]:
        """The part of each process, by rank."""
        bounds = torch.arange(len(self)).tensor_split(processes)
        return [self._some(part.tolist()) for part in bounds]

    def batches(self, size: int) -> list[Samples]:
        """Batches of up to ``size`` samples; one with extra inputs is alone, without padding."""
        return list(self._batches(size))

    def _batches(self, size: int) -> Iterator[Samples]:
        plain: list[int] = []
        for number in range(len(self)):
            if self.extra and self.extra[number]:
                if plain:
                    yield self._some(plain)
                plain = []
                yield self._some([number])._unpadded()
                continue
            plain.append(number)
            if len(plain) == size:
                yield self._some(plain)
                plain = []
        if plain:
            yield self._some(plain)

    def probe(self, count: int) -> Samples:
        """Up to ``count`` tokens of the first sample, without extra inputs.

        Of a sample with extra inputs these are tokens that occur once: the marks at which a model
        puts a picture occur many times.
        """
        tokens = self.tokens[0]
        if self.extra and self.extra[0]:
            found, times = tokens[tokens >= 0].unique(return_counts=True)
            tokens = found[times == times.min()]
        return Samples(tokens[None, :count])

    def digest(self) -> str:
        """A hash of everything that the model and the statistics see."""
        found = hashlib.sha256(self.tokens.numpy().data)
        if self.mask is not None:
            found.update(self.mask.numpy().data)
        for number, extra in enumerate(self.extra):
            for name, value in sorted(extra.items()):
                found.update(f"{number} {name} {value.dtype} {tuple(value.shape)}".encode())
                found.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
        return found.hexdigest()

    def _some(self, numbers: Sequence[int]) -> Samples:
        rows = torch.tensor(numbers, dtype=torch.int64)
        mask = None if self.mask is None else self.mask[rows]
        extra = tuple(self.extra[number] for number in numbers) if self.extra else ()
        return Samples(self.tokens[rows], mask, extra if any(extra) else ())

    def _unpadded(self) -> Samples:
        count = int((self.tokens >= 0).sum())
        mask = None if self.mask is None else self.mask[:, :count]
        return Samples(self.tokens[:, :count], mask, self.extra)
