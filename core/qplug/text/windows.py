"""Cuts documents into windows of tokens, for calibration and for perplexity.

No window has special tokens. Every function creates its own random generator, so that a seed gives
the same windows on any machine, whatever random numbers were drawn before.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from qplug.api import Conversation
from qplug.errors import QplugError
from qplug.text.conversations import Renderer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from qplug.api import Dataset, Split, Tokenizer

#: Characters to tokenise first; the number of their tokens tells how many more to tokenise.
_BEGINNING = 1 << 15
#: The rest of the text may have fewer tokens a character, by up to this factor.
_SPARE = 1.1
#: Tokens at the end of a cut text that may differ from those of the whole text.
_CUT_OFF = 128
#: The longest text, in characters, whose tokens are cached for the next run of this process.
_LONGEST_CACHED = 1 << 22


def random_windows(
    dataset: Dataset[Any], tokenizer: Tokenizer, *, length: int, count: int, seed: int
) -> Iterator[Tensor]:
    """Returns ``count`` windows, int64 ``[length]``, drawn from the whole calibration text.

    The documents are joined; windows begin at random tokens and may overlap. Raises QplugError,
    before the first window, if the text is shorter than one window.
    """
    ids = _text_tokens(dataset, tokenizer, length, "calibration")
    rng = random.Random(seed)  # noqa: S311 - must be reproducible, not secret
    starts = [rng.randrange(len(ids) - length + 1) for _ in range(count)]
    return (_window(ids, start, length) for start in starts)


def sample(
    dataset: Dataset[Any], tokenizer: Tokenizer, how: str, *, length: int, count: int, seed: int
) -> Iterator[Tensor]:
    """Returns ``count`` windows of up to ``length`` tokens for calibration, int64 ``[length]``.

    ``how`` is one of: ``dataset``, the dataset's own ``samples``, or ``windows`` if it has none;
    ``windows``, as ``random_windows``; ``documents``, as ``document_windows`` from a random token
    of each document; ``leading``, the same from the first token; ``packed``, as
    ``packed_windows``. Raises QplugError if the text is too short.
    """
    if how == "dataset" and dataset.cuts_windows():
        drawn = dataset.samples(tokenizer, length=length, count=count, seed=seed)
        return cast("Iterator[Tensor]", drawn)
    if how in ("dataset", "windows"):
        return random_windows(dataset, tokenizer, length=length, count=count, seed=seed)
    documents = _texts(dataset, "calibration")
    if how == "packed":
        return packed_windows(documents, tokenizer, length=length, count=count, seed=seed)
    start: Literal["random", "leading"] = "leading" if how == "leading" else "random"
    return document_windows(
        documents, tokenizer, length=length, count=count, seed=seed, start=start
    )


def packed_windows(
    documents: Sequence[str], tokenizer: Tokenizer, *, length: int, count: int, seed: int
) -> Iterator[Tensor]:
    """Returns ``count`` windows, int64 ``[length]``, cut from short documents in sequence.

    AWQ's authors sample like this: documents in a random order, without those longer than a
    window, are joined to one sequence of tokens, which is cut into windows. Raises QplugError,
    before the first window, if there are too few tokens.
    """
    rng = random.Random(seed)  # noqa: S311 - must be reproducible, not secret
    order = list(range(len(documents)))
    rng.shuffle(order)
    sequence: list[int] = []
    for index in order:
        if len(sequence) >= count * length:
            break
        ids = tokenizer.encode(documents[index].strip(), add_special_tokens=False)
        sequence.extend(ids if len(ids) <= length else ())
    if len(sequence) < count * length:
        raise QplugError(
            f"of the {len(documents)} documents, those of up to {length} tokens fill "
            f"{len(sequence) // length} windows, {count} are needed: ask for fewer or shorter "
            "samples"
        )
    return (_window(sequence, number * length, length) for number in range(count))


def first_windows(
    dataset: Dataset[Any], tokenizer: Tokenizer, *, length: int, count: int, split: Split
) -> Tensor:
    """Returns the first windows of the joined text, without overlap, int64 ``[n, length]``.

    ``n`` is ``count``, or less if the text ends before; tokens at its end that do not fill a
    window are not used. Raises QplugError if the text is shorter than one window.
    """
    ids = _text_tokens(dataset, tokenizer, length, split, first=count * length)
    n = min(count, len(ids) // length)
    return torch.tensor(ids[: n * length], dtype=torch.int64).view(n, length)


def document_windows(
    documents: Sequence[str],
    tokenizer: Tokenizer,
    *,
    length: int,
    count: int,
    seed: int,
    start: Literal["random", "leading"] = "random",
) -> Iterator[Tensor]:
    """Returns ``count`` windows, int64 ``[length]``, each from a different document.

    This suits corpora that are too large to be joined: documents are tried in a random order,
    documents shorter than a window are skipped, and no more documents are tokenised than needed.
    With ``start="random"`` a window begins at a random token of its document, with ``"leading"``
    at the first token. Raises QplugError, before the first window, if fewer than ``count``
    documents are long enough.
    """
    rng = random.Random(seed)  # noqa: S311 - must be reproducible, not secret
    order = list(range(len(documents)))
    rng.shuffle(order)
    windows: list[Tensor] = []
    for index in order:
        if len(windows) == count:
            break
        ids = tokenizer.encode(documents[index], add_special_tokens=False)
        if len(ids) >= length:
            first = rng.randrange(len(ids) - length + 1) if start == "random" else 0
            windows.append(_window(ids, first, length))
    if len(windows) < count:
        raise QplugError(
            f"{len(windows)} of {len(documents)} documents have {length} tokens or more, "
            f"{count} are needed: ask for fewer or shorter samples"
        )
    return iter(windows)


def _text_tokens(
    dataset: Dataset[Any],
    tokenizer: Tokenizer,
    length: int,
    split: Split,
    first: int | None = None,
) -> list[int]:
    """Returns the tokens of the joined text, or the ``first`` of them.

    The text of conversations is what the chat template makes of them, one after the other. With
    ``first`` a long text is tokenised only as far as needed. Raises QplugError if the text is
    shorter than a window of ``length`` tokens.
    """
    documents = list(dataset.documents(split))
    if documents and isinstance(documents[0], Conversation):
        render, ids = Renderer(tokenizer), []
        for document in documents:
            ids += render(cast("Conversation", document)).tokens.tolist()
            if first is not None and len(ids) >= first:
                break
    else:
        text = dataset.separator.join(cast("list[str]", documents))
        if first is not None and len(text) > _BEGINNING:
            # Cutting the text changes the tokens of the last words before the cut, but no others.
            wanted, size = first + _CUT_OFF, _BEGINNING
            while size < len(text):
                ids = tokenizer.encode(text[:size], add_special_tokens=False)
                if len(ids) >= wanted:
                    return ids[:first]
                size = int(size * max(2, _SPARE * wanted / max(1, len(ids))))
        ids = _encoded(text, tokenizer)
    if len(ids) < length:
        raise QplugError(
            f"dataset {dataset.name}: its {split} text has {len(ids)} tokens, fewer than one "
            f"window of {length}: ask for shorter windows, or use more text"
        )
    return ids


def _texts(dataset: Dataset[Any], split: Split) -> list[str]:
    """Returns the documents of a dataset of texts. Raises QplugError if it has conversations."""
    documents = list(dataset.documents(split))
    if documents and isinstance(documents[0], Conversation):
        raise QplugError(f"dataset {dataset.name}: has conversations, which are no text to cut")
    return cast("list[str]", documents)


def _encoded(text: str, tokenizer: Tokenizer) -> list[int]:
    """Returns the tokens of ``text``; those of the last two texts are cached.

    Tokens of a tokenizer that is not from the tokenizers library are not cached, since there is no
    way to compare such tokenizers.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or len(text) > _LONGEST_CACHED:
        return tokenizer.encode(text, add_special_tokens=False)
    return _tokens_of(_Encoding(text, type(tokenizer), backend.to_str(), tokenizer))


@dataclass(frozen=True)
class _Encoding:
    """A text and its tokenizer, as a key of the cache: equal keys have equal tokens."""

    text: str
    kind: type
    definition: str
    tokenizer: Tokenizer = field(compare=False)


@lru_cache(maxsize=2)
def _tokens_of(encoding: _Encoding) -> list[int]:
    return encoding.tokenizer.encode(encoding.text, add_special_tokens=False)


def _window(ids: list[int], start: int, length: int) -> Tensor:
    return torch.tensor(ids[start : start + length], dtype=torch.int64)
