"""From documents to windows of tokens: what is calibrated on, and what perplexity is measured on.

No window has special tokens. Each function draws from a generator of its own, so that the same
seed gives the same windows on any machine and whatever else was drawn before.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch

from qplug.errors import QplugError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from qplug.api import Dataset, Split, Tokenizer

#: Characters that are tried first; their tokens tell how many more are needed.
_BEGINNING = 1 << 15
#: Other parts of the text may have so many times fewer tokens.
_SPARE = 1.1
#: Tokens at the end of a part that may not be those of the whole text.
_CUT_OFF = 128
#: The longest text, in characters, whose tokens are kept for the next run of this process.
_KEPT = 1 << 22


def random_windows(
    dataset: Dataset[Any], tokenizer: Tokenizer, *, length: int, count: int, seed: int
) -> Iterator[Tensor]:
    """``count`` windows of ``length`` tokens, int64, from anywhere in the calibration text.

    They may overlap. Raises QplugError at once if the text is shorter than one window.
    """
    ids = _text_tokens(dataset, tokenizer, length, "calibration")
    rng = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret
    starts = [rng.randrange(len(ids) - length + 1) for _ in range(count)]
    return (_window(ids, start, length) for start in starts)


def sample(
    dataset: Dataset[Any], tokenizer: Tokenizer, how: str, *, length: int, count: int, seed: int
) -> Iterator[Tensor]:
    """``count`` windows of ``length`` tokens, int64, for calibration.

    ``how``: ``dataset``, as the dataset has it; ``windows``, from anywhere in the joined text;
    ``documents`` and ``leading``, each from another document, from anywhere in it or its start;
    ``packed``, from short documents one after another.
    """
    if how == "dataset" and dataset.cuts_windows():
        return dataset.samples(tokenizer, length=length, count=count, seed=seed)
    if how in ("dataset", "windows"):
        return random_windows(dataset, tokenizer, length=length, count=count, seed=seed)
    documents = list(dataset.documents("calibration"))
    if how == "packed":
        return packed_windows(documents, tokenizer, length=length, count=count, seed=seed)
    start: Literal["random", "leading"] = "leading" if how == "leading" else "random"
    return document_windows(
        documents, tokenizer, length=length, count=count, seed=seed, start=start
    )


def packed_windows(
    documents: Sequence[str], tokenizer: Tokenizer, *, length: int, count: int, seed: int
) -> Iterator[Tensor]:
    """``count`` windows of ``length`` tokens, int64, side by side in a row of short documents.

    As AWQ's authors sample: documents in a random order, those longer than a window passed over,
    the others put one after another. Raises QplugError at once if they end too soon.
    """
    rng = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret
    order = list(range(len(documents)))
    rng.shuffle(order)
    row: list[int] = []
    for index in order:
        if len(row) >= count * length:
            break
        ids = tokenizer.encode(documents[index].strip(), add_special_tokens=False)
        row.extend(ids if len(ids) <= length else ())
    if len(row) < count * length:
        raise QplugError(
            f"the {len(documents)} documents of up to {length} tokens fill "
            f"{len(row) // length} windows, {count} are needed: ask for fewer or shorter samples"
        )
    return (_window(row, number * length, length) for number in range(count))


def first_windows(
    dataset: Dataset[Any], tokenizer: Tokenizer, *, length: int, count: int, split: Split
) -> Tensor:
    """The first windows of the text side by side, int64 ``[n, length]``.

    ``n`` is ``count``, or less where the text ends before; what is left over at its end is not
    used. Raises QplugError if the text is shorter than one window.
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
    """``count`` windows of ``length`` tokens, int64, each from another document.

    For corpora too large to be read as one text: documents are tried in a random order, those
    shorter than a window are passed over, and no more are tokenised than are needed. A window
    begins anywhere in its document (``random``) or where the document does (``leading``). Raises
    QplugError at once if there are not ``count`` documents of that length.
    """
    rng = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret
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
    """The tokens of the joined text, or its ``first`` ones: of a long text more are not made."""
    text = dataset.separator.join(dataset.documents(split))
    if first is not None and len(text) > _BEGINNING:
        # The tokens of the last words may be others where a text is cut off, no others are.
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
            f"window of {length}: ask for shorter windows or give it more text"
        )
    return ids


def _encoded(text: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of ``text``, which are not computed again for a text that was met a moment ago.

    Only tokenizers of the tokenizers library can be compared; the tokens of others are not kept.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or len(text) > _KEPT:
        return tokenizer.encode(text, add_special_tokens=False)
    return _tokens_of(_Encoding(text, type(tokenizer), backend.to_str(), tokenizer))


@dataclass(frozen=True)
class _Encoding:
    """A text to tokenize. Two are equal if their tokens are."""

    text: str
    kind: type
    definition: str
    tokenizer: Tokenizer = field(compare=False)


@lru_cache(maxsize=2)
def _tokens_of(encoding: _Encoding) -> list[int]:
    return encoding.tokenizer.encode(encoding.text, add_special_tokens=False)


def _window(ids: list[int], start: int, length: int) -> Tensor:
    return torch.tensor(ids[start : start + length], dtype=torch.int64)
