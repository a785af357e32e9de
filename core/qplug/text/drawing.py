"""Draws calibration samples from a dataset, whether it holds texts or conversations."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch

from qplug.api import Conversation
from qplug.errors import QplugError
from qplug.text.conversations import Renderer, Sample
from qplug.text.windows import sample

if TYPE_CHECKING:
    from qplug.api import Dataset


def draw(
    dataset: Dataset[Any], render: Renderer, how: str, *, length: int, count: int, seed: int
) -> list[Sample]:
    """Returns ``count`` samples of up to ``length`` tokens from the calibration data of a dataset.

    ``how`` cuts texts as in ``qplug.text.sample``. A sample of conversations is, with ``dataset``
    or ``leading``, the start of one conversation; with ``documents`` any part of one; with
    ``windows`` any part of all conversations in sequence; with ``packed`` a part of conversations
    that are joined in a random order, without those longer than a window. The same seed gives the
    same samples. Raises QplugError if there are too few of them.
    """
    if how == "dataset" and dataset.cuts_windows():
        drawn: Iterator[Any] = iter(
            dataset.samples(render.tokenizer, length=length, count=count, seed=seed)
        )
        first = next(drawn, None)
        if isinstance(first, Conversation):
            return _leading(dataset.name, chain([first], drawn), render, length, count)
        return [Sample(tokens) for tokens in ([] if first is None else chain([first], drawn))]
    if not isinstance(next(iter(dataset.documents("calibration")), None), Conversation):
        windows = sample(dataset, render.tokenizer, how, length=length, count=count, seed=seed)
        return list(map(Sample, windows))
    conversations = list(cast("Iterable[Conversation]", dataset.documents("calibration")))
    rng = random.Random(seed)  # noqa: S311 - must be reproducible, not secret
    if how == "windows":
        whole = _joined(map(render, conversations))
        return _anywhere(dataset.name, whole, length, count, rng)
    order = list(range(len(conversations)))
    rng.shuffle(order)
    shuffled = [conversations[index] for index in order]
    if how == "packed":
        return _packed(dataset.name, map(render, shuffled), length, count)
    start = rng if how == "documents" else None
    return _leading(dataset.name, shuffled, render, length, count, start)


def _leading(
    name: str,
    conversations: Iterable[Conversation],
    render: Renderer,
    length: int,
    count: int,
    rng: random.Random | None = None,
) -> list[Sample]:
    """Returns a sample of each of the first ``count`` conversations that have tokens that count.

    A sample is the start of its conversation; with ``rng`` it is any part of a longer one. A
    conversation with pictures is never cut: longer ones are left out.
    """
    samples: list[Sample] = []
    tried = 0
    for conversation in conversations:
        if len(samples) == count:
            break
        tried += 1
        whole = render(conversation)
        spare = max(0, len(whole.tokens) - length)
        if whole.extra and spare:
            continue  # pictures cannot be cut
        part = whole.part(rng.randrange(spare + 1) if rng else 0, length)
        if len(part.tokens) and part.counts:
            samples.append(part)
    if len(samples) < count:
        raise QplugError(
            f"dataset {name}: {len(samples)} of {tried} conversations have tokens to calibrate on "
            f"in a window of {length}, {count} are needed: ask for fewer samples, or longer ones"
        )
    return samples


def _anywhere(
    name: str, whole: Sample, length: int, count: int, rng: random.Random
) -> list[Sample]:
    spare = len(whole.tokens) - length
    if spare < 0:
        raise _too_short(name, whole, length, 1)
    return [whole.part(rng.randrange(spare + 1), length) for _ in range(count)]


def _packed(name: str, rendered: Iterable[Sample], length: int, count: int) -> list[Sample]:
    taken: list[Sample] = []
    total = 0
    for conversation in rendered:
        if total >= count * length:
            break
        if len(conversation.tokens) <= length:
            taken.append(conversation)
            total += len(conversation.tokens)
    whole = _joined(taken)
    if total < count * length:
        raise _too_short(name, whole, length, count)
    return [whole.part(number * length, length) for number in range(count)]


def _joined(samples: Iterable[Sample]) -> Sample:
    """Returns the ``samples`` in sequence. Raises QplugError if there are pictures among them."""
    parts = list(samples)
    if any(part.extra for part in parts):
        raise QplugError("conversations with pictures cannot be joined: leave --sampling out")
    masks = [
        torch.ones(len(part.tokens), dtype=torch.bool) if part.counted is None else part.counted
        for part in parts
    ]
    tokens = torch.cat([torch.empty(0, dtype=torch.int64), *(part.tokens for part in parts)])
    masked = any(part.counted is not None for part in parts)
    return Sample(tokens, torch.cat(masks) if masked else None)


def _too_short(name: str, whole: Sample, length: int, count: int) -> QplugError:
    return QplugError(
        f"dataset {name}: its conversations have {len(whole.tokens)} tokens to join, fewer than "
        f"{count} windows of {length}: ask for fewer or shorter samples"
    )
