"""Conversations with pictures become the inputs of a model by the model's own processor."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import PARTS, chat_tokenizer, shown, turns, write_picture, write_small_llava

from qplug import Conversation, Dataset, NoParams, QplugError
from qplug.model.processor import load_processor
from qplug.model.tokenizer import load_tokenizer
from qplug.testing.models import write_tiny_model
from qplug.text.conversations import Renderer, _spread
from qplug.text.drawing import draw


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_llava(tmp_path_factory.mktemp("llava") / "model")


@pytest.fixture(scope="module")
def render(llava: Path) -> Renderer:
    return Renderer(load_tokenizer(str(llava)), True, lambda: load_processor(str(llava)))


def conversation(folder: Path, *messages: Mapping[str, Any]) -> Conversation:
    return Conversation(messages, pictures=folder, where="chats.jsonl:1")


def test_a_picture_becomes_tokens_and_pixels(tmp_path: Path, render: Renderer) -> None:
    write_picture(tmp_path / "cats/one.png")
    messages = [*shown("cats/one.png", "What?", "A cat."), *turns("Sure?", "Yes.")]
    sample = render(conversation(tmp_path, *messages))
    text = str(render.tokenizer.decode(sample.tokens))
    assert text == "[user]<image><image><image><image>What?;[assistant]A cat.;[user]Sure?;[ass" + (
        "istant]Yes.;"
    )
    assert sample.counted is not None
    # This template has no token that ends a message.
    assert str(render.tokenizer.decode(sample.tokens[sample.counted])).startswith("[assistant]A ca")
    assert set(sample.extra) == {"pixel_values"}
    assert sample.extra["pixel_values"].shape == (1, 3, 28, 28)
    assert replace(render, answers_only=False)(conversation(tmp_path, *messages)).counted is None


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "url": "one.png"},
        {"type": "image", "image": "one.png"},
        {"type": "image_url", "image_url": {"url": "one.png"}},
    ],
)
def test_other_spellings_of_a_picture(
    tmp_path: Path, render: Renderer, part: dict[str, Any]
) -> None:
    write_picture(tmp_path / "one.png")
    sample = render(
        conversation(tmp_path, {"role": "user", "content": [part]}, *turns("", "Hi")[1:])
    )
    assert torch.is_tensor(sample.extra["pixel_values"])


def test_texts_are_rendered_as_the_template_wants_them(render: Renderer) -> None:
    """A template that loops over parts writes nothing of a text."""
    sample = render(Conversation(turns("Hi", "Ho")))
    assert str(render.tokenizer.decode(sample.tokens)) == "[user]Hi;[assistant]Ho;"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image", "url": "https://a.b/c.png"}, "only files are read as pictures: save it"),
        ({"type": "image", "url": "data:image/png;base64,AA"}, "only files are read as pictures"),
        (
            {"type": "image", "path": "../out.png"},
            r"\.\./out\.png: is outside of .*pictures=FOLDER",
        ),
        ({"type": "image", "path": "/etc/passwd"}, "/etc/passwd: is outside of"),
        ({"type": "image", "path": "link.png"}, r"link\.png: is outside of"),
        ({"type": "image", "path": "no.png"}, r"no\.png: no such picture"),
        ({"type": "image", "path": "text.png"}, r"text\.png: cannot be read: UnidentifiedImageErr"),
        ({"type": "image", "path": "folder"}, "folder: cannot be read: it is a folder"),
        ({"type": "image"}, "a picture has no path"),
        ({"type": "video", "path": "a.mp4"}, "a part of type 'video'; qplug reads text and image"),
    ],
)
def test_what_is_no_picture_of_the_folder_is_refused(
    tmp_path: Path, render: Renderer, part: dict[str, Any], message: str
) -> None:
    (folder := tmp_path / "chats").mkdir()
    (folder / "folder").mkdir()
    (folder / "text.png").write_text("text")
    (folder / "link.png").symlink_to(write_picture(tmp_path / "out.png"))
    with pytest.raises(QplugError, match=message) as caught:
        render(conversation(folder, {"role": "user", "content": [part]}))
    assert str(caught.value).startswith("chats.jsonl:1: ")
    assert "\n" not in str(caught.value)


def test_too_many_pixels_are_refused(
    tmp_path: Path, render: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_picture(tmp_path / "one.png")
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 40 * 20)
    with pytest.raises(QplugError, match=r"one\.png: cannot be read: DecompressionBomb"):
        render(conversation(tmp_path, *shown("one.png", "What?", "A cat.")))


def test_pillow_is_needed(
    tmp_path: Path, render: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(QplugError, match=r"pillow is needed: pip install 'qplug\[vision\]'"):
        render(conversation(tmp_path, *shown("one.png", "What?", "A cat.")))


def test_a_model_without_pictures(tmp_path: Path) -> None:
    write_picture(tmp_path / "one.png")
    model = str(write_tiny_model(tmp_path / "model"))
    chat = conversation(tmp_path, *shown("one.png", "What?", "A cat."))
    with pytest.raises(QplugError, match="processor"):
        Renderer(load_tokenizer(model), False, lambda: load_processor(model))(chat)
    with pytest.raises(
        QplugError, match=r"chats\.jsonl:1: has pictures, and only text is read here"
    ):
        Renderer(chat_tokenizer(PARTS))(chat)


def test_samples_with_pictures_are_never_cut(tmp_path: Path, render: Renderer) -> None:
    write_picture(tmp_path / "one.png")

    class Shown(Dataset[NoParams]):
        """Three conversations of different lengths."""

        name = "shown"

        def documents(self, split: object) -> Any:
            for words in ("What?", "What is it?", "What " * 20):
                yield conversation(tmp_path, *shown("one.png", words, "A cat."))

    dataset = Shown(NoParams())
    samples = draw(dataset, render, "dataset", length=60, count=2, seed=0)
    assert {len(sample.tokens) for sample in samples} == {34, 40}
    with pytest.raises(QplugError, match="2 of 3 conversations have tokens to calibrate on"):
        draw(dataset, render, "dataset", length=60, count=3, seed=0)
    with pytest.raises(QplugError, match="conversations with pictures cannot be joined"):
        draw(dataset, render, "packed", length=200, count=1, seed=0)


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [
        ([1, 7, 2, 3], "..23"),
        ([1, 7, 7, 7, 2, 3], "....23"),  # a placeholder is repeated
        ([1, 9, 9, 7, 8, 8, 9, 2, 3], ".......23"),  # words are put around it
    ],
)
def test_answers_are_found_between_what_a_processor_puts_in(tokens: list[int], wanted: str) -> None:
    ids, answered = [1, 7, 2, 3], [False, False, True, True]
    spread = _spread(ids, answered, tokens)
    assert spread is not None
    shown = (str(t) if counts else "." for t, counts in zip(tokens, spread, strict=True))
    assert "".join(shown) == wanted
    assert _spread(ids, answered, [1, 7, 3]) is None
