from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from qplug import Dataset, NoParams, QplugError, Split, Tokenizer
from qplug.checkpoint.locate import DEMO
from qplug.model.tokenizer import load_tokenizer
from qplug.text import windows
from qplug.text.windows import document_windows, first_windows, random_windows, sample

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


class Given(Dataset[NoParams]):
    """Documents that a test gives."""

    name = "given"
    separator = "|"

    def __init__(self, *texts: str, evaluation: tuple[str, ...] = ()) -> None:
        super().__init__(NoParams())
        self.texts: dict[Split, tuple[str, ...]] = {"calibration": texts, "evaluation": evaluation}

    def documents(self, split: Split) -> Iterator[str]:
        return iter(self.texts[split])


def text_of(window: Tensor) -> str:
    return "".join(map(chr, window.tolist()))


def texts_of(windows: Iterator[Tensor]) -> list[str]:
    return [text_of(window) for window in windows]


# No character comes twice, so that a window tells where it was taken.
LONG = "".join(map(chr, range(0x4E00, 0x4E00 + 5000)))

texts = st.lists(st.text(st.characters(codec="utf-8"), max_size=30), min_size=1, max_size=6)
seeds = st.integers(0, 2**64)


@given(texts, st.integers(1, 40), st.integers(0, 5), seeds)
def test_random_windows_come_from_the_joined_text(
    tokenizer: Tokenizer, texts: list[str], length: int, count: int, seed: int
) -> None:
    dataset, joined = Given(*texts), "|".join(texts)
    if len(joined) < length:
        with pytest.raises(QplugError, match=f"has {len(joined)} tokens"):
            random_windows(dataset, tokenizer, length=length, count=count, seed=seed)
        return
    windows = list(random_windows(dataset, tokenizer, length=length, count=count, seed=seed))
    assert len(windows) == count
    for window in windows:
        assert window.dtype == torch.int64
        assert window.shape == (length,)
        assert text_of(window) in joined


@given(seeds, seeds)
def test_the_seed_decides_random_windows(tokenizer: Tokenizer, one: int, other: int) -> None:
    def draw(seed: int) -> list[str]:
        return texts_of(random_windows(Given(LONG), tokenizer, length=8, count=16, seed=seed))

    assert draw(one) == draw(one)
    assert (draw(one) == draw(other)) == (one == other)


def test_random_windows_are_these_on_every_platform(tokenizer: Tokenizer) -> None:
    windows = random_windows(Given(LONG), tokenizer, length=4, count=5, seed=0)
    assert [int(w[0]) - 0x4E00 for w in windows] == [3155, 3445, 331, 2121, 4188]


def test_random_windows_reach_both_ends(tokenizer: Tokenizer) -> None:
    windows = texts_of(random_windows(Given("abc"), tokenizer, length=2, count=50, seed=0))
    assert set(windows) == {"ab", "bc"}


def test_the_global_generator_is_neither_used_nor_moved(tokenizer: Tokenizer) -> None:
    random.seed(1)
    before = random.getstate()
    first = texts_of(random_windows(Given(LONG), tokenizer, length=8, count=4, seed=3))
    assert random.getstate() == before
    random.seed(2)
    assert texts_of(random_windows(Given(LONG), tokenizer, length=8, count=4, seed=3)) == first


def test_windows_share_no_memory(tokenizer: Tokenizer) -> None:
    one, other = random_windows(Given("aaaa"), tokenizer, length=4, count=2, seed=0)
    one.zero_()
    assert text_of(other) == "aaaa"


def test_samples_of_a_dataset_are_random_windows(tokenizer: Tokenizer) -> None:
    dataset = Given(LONG)
    expected = texts_of(random_windows(dataset, tokenizer, length=8, count=4, seed=5))
    assert texts_of(sample(dataset, tokenizer, "dataset", length=8, count=4, seed=5)) == expected


@given(texts, st.integers(1, 40), st.integers(1, 5))
def test_first_windows_lie_side_by_side(
    tokenizer: Tokenizer, texts: list[str], length: int, count: int
) -> None:
    dataset, joined = Given(evaluation=tuple(texts)), "|".join(texts)
    if len(joined) < length:
        with pytest.raises(QplugError, match=f"has {len(joined)} tokens"):
            first_windows(dataset, tokenizer, length=length, count=count, split="evaluation")
        return
    windows = first_windows(dataset, tokenizer, length=length, count=count, split="evaluation")
    n = min(count, len(joined) // length)
    assert windows.dtype == torch.int64
    assert windows.shape == (n, length)
    assert text_of(windows.flatten()) == joined[: n * length]


@pytest.mark.parametrize(
    ("length", "count", "encoded"),
    # A beginning, which may do; what it tells is needed; all where the text is short or ends.
    [
        (8, 4, [32768]),
        (900, 85, [32768, 84290]),
        (900, 200, [32768, 100_000]),
        (8, 4, [3000]),
    ],
)
def test_first_windows_tokenise_no_more_of_a_long_text_than_they_need(
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    length: int,
    count: int,
    encoded: list[int],
) -> None:
    text = (LONG * 20)[:100_000] if encoded[0] != 3000 else LONG[:3000]
    lengths = []

    def encode(text: str, *, add_special_tokens: bool) -> list[int]:
        lengths.append(len(text))
        return [ord(character) for character in text]

    monkeypatch.setattr(tokenizer, "encode", encode)
    windows = first_windows(Given(text), tokenizer, length=length, count=count, split="calibration")
    assert lengths == pytest.approx(encoded, abs=1)
    assert text_of(windows.flatten()) == text[: windows.numel()]
    assert len(windows) == min(count, len(text) // length)


def test_first_windows_of_a_part_are_those_of_the_whole_text() -> None:
    """A real tokenizer, and words that are long where the part ends."""
    tokenizer = load_tokenizer(DEMO, trust_remote_code=False)
    text = "".join(f"{'un' * (n % 37)}believable {n}\n" for n in range(4000))
    whole = tokenizer.encode(text, add_special_tokens=False)
    for count in range(1, 40):
        read = first_windows(Given(text), tokenizer, length=7, count=count, split="calibration")
        assert read.flatten().tolist() == whole[: 7 * count]


def test_first_windows_read_the_split_that_is_asked_for(tokenizer: Tokenizer) -> None:
    dataset = Given("train", evaluation=("other",))
    read = first_windows(dataset, tokenizer, length=5, count=1, split="calibration")
    assert text_of(read[0]) == "train"


@given(
    documents=st.lists(st.text(st.characters(codec="utf-8"), max_size=12), max_size=8),
    length=st.integers(1, 8),
    count=st.integers(0, 6),
    seed=seeds,
    start=st.sampled_from(["random", "leading"]),
)
def test_document_windows_are_each_from_another_document(
    tokenizer: Tokenizer, *, documents: list[str], length: int, count: int, seed: int, start: Any
) -> None:
    def draw() -> list[str]:
        return texts_of(
            document_windows(
                documents, tokenizer, length=length, count=count, seed=seed, start=start
            )
        )

    long_enough = [text for text in documents if len(text) >= length]
    if len(long_enough) < count:
        message = f"{len(long_enough)} of {len(documents)} documents have {length} tokens or more"
        with pytest.raises(QplugError, match=message):
            draw()
        return
    windows = draw()
    assert windows == draw()
    assert len(windows) == count
    for window in windows:
        assert len(window) == length
        assert any(
            text.startswith(window) if start == "leading" else window in text
            for text in long_enough
        )


def test_document_windows_use_no_document_twice(tokenizer: Tokenizer) -> None:
    documents = [chr(0x4E00 + number) * 4 for number in range(64)]
    windows = texts_of(document_windows(documents, tokenizer, length=4, count=64, seed=9))
    assert sorted(windows) == documents
    assert windows != documents


def test_document_windows_tokenise_no_more_than_they_need(tokenizer: Tokenizer) -> None:
    calls = []

    class Counting:
        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            calls.append(text)
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)

    list(document_windows(["long enough"] * 1000, Counting(), length=4, count=3, seed=0))
    assert len(calls) == 3


@given(seeds, seeds)
def test_the_seed_decides_document_windows(tokenizer: Tokenizer, one: int, other: int) -> None:
    documents = [LONG[i * 50 : i * 50 + 50] for i in range(100)]

    def draw(seed: int) -> list[str]:
        return texts_of(document_windows(documents, tokenizer, length=8, count=16, seed=seed))

    assert (draw(one) == draw(other)) == (one == other)


def test_a_tokenizer_of_transformers_adds_no_special_tokens() -> None:
    from tokenizers.processors import TemplateProcessing

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "a": 1, "b": 2}, "a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")  # type: ignore[no-untyped-call]
    tokenizer: Tokenizer = made
    assert tokenizer.encode("a b", add_special_tokens=True) == [0, 1, 2]
    read = first_windows(Given("a b a b"), tokenizer, length=2, count=9, split="calibration")
    assert read.tolist() == [[1, 2], [1, 2]]


def test_a_text_is_tokenized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []

    class Counting(PreTrainedTokenizerFast):
        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:  # type: ignore[override]
            encoded.append(text)
            return [self.bos_token_id, *range(9)]

    def draw(dataset: Given, bos: str = "<s>") -> None:
        words = {"a": 0, "<s>": 1, "<t>": 2}
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "a"))
        tokenizer = Counting(tokenizer_object=backend, bos_token=bos)  # type: ignore[no-untyped-call]
        (window,) = random_windows(dataset, tokenizer, length=10, count=1, seed=0)
        assert window[0] == words[bos]

    for _ in range(2):
        draw(Given("a b"))
    assert len(encoded) == 1
    draw(Given("a b"), bos="<t>")  # another tokenizer
    draw(Given("a c"))  # another text
    assert len(encoded) == 3
    monkeypatch.setattr(windows, "_LONGEST_CACHED", 2)
    for _ in range(2):
        draw(Given("a b"))
    assert len(encoded) == 5
