from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from chats import GENERATION, WriteChats, chat_tokenizer, turns

from qplug import Conversation, QplugError
from qplug.api.params import fill
from qplug.text.conversations import Renderer
from qplug.text.drawing import draw
from qplug_text.text_files import Params, TextFiles

if TYPE_CHECKING:
    from torch import Tensor

    from qplug import Tokenizer


def text_of(window: Tensor) -> str:
    return "".join(map(chr, window.tolist()))


def read(path: Path, **options: Any) -> list[str | Conversation]:
    return [*TextFiles(Params(path, **options)).documents("calibration")]


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())
    return path


@pytest.mark.parametrize("name", ["calib.txt", "notes.md", "README", "log.out"])
def test_a_file_is_read_as_it_is(tmp_path: Path, name: str) -> None:
    content = "\ufeff  one\r\ntwo \n\n\u2028three\t\n\n"
    assert read(write(tmp_path / name, content)) == [content]


def test_both_splits_read_the_same_text(tmp_path: Path) -> None:
    dataset = TextFiles(Params(write(tmp_path / "a.txt", "text")))
    assert list(dataset.documents("evaluation")) == list(dataset.documents("calibration"))


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/b/c.jsonl", "a.txt", "B.TXT"):
        content = json.dumps(name) if name.endswith("jsonl") else name
        write(tmp_path / name, content)
    for name in ("config.json", "a/x.py", ".git/x.txt", "a/.ipynb_checkpoints/x.md", ".hidden.txt"):
        write(tmp_path / name, "not read")
    assert read(tmp_path) == ["B.TXT", "a.txt", "a/b/c.jsonl", "a/z.md", "b.txt"]


def test_a_folder_below_a_hidden_one_is_read(tmp_path: Path) -> None:
    write(tmp_path / ".data/a.txt", "read")
    assert read(tmp_path / ".data") == ["read"]


def test_jsonl_holds_objects_or_strings(tmp_path: Path) -> None:
    # U+2028 and U+0085 end a line for str.splitlines, not in JSON.
    lines = ['{"text": "one\\n", "n": 1}', "", '"two \u2028 \x85 still two"', ' {"text": ""} ']
    path = write(tmp_path / "a.jsonl", "\ufeff" + "\r\n".join(lines) + "\r\n")
    assert read(path) == ["one\n", "two \u2028 \x85 still two", ""]


def test_json_holds_a_list(tmp_path: Path) -> None:
    path = write(tmp_path / "samples.json", '[{"question": "one"}, "two"]')
    assert read(path, field="question") == ["one", "two"]


def test_sequential_samples_are_the_first_windows_of_the_file(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = write(tmp_path / "calib.txt", " Once upon a time,\nthere was a weight.\n" * 20)
    params = fill(Params, {"path": str(path), "order": "sequential"}, "dataset text")
    samples = TextFiles(params).samples(tokenizer, length=32, count=8, seed=0)
    ids = tokenizer.encode(path.read_text("utf-8"), add_special_tokens=False)
    assert [s.tolist() for s in samples] == [ids[i * 32 : (i + 1) * 32] for i in range(8)]


def test_random_samples_are_from_anywhere(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset = TextFiles(Params(write(tmp_path / "a.txt", "abcdefgh" * 50)))
    samples = [text_of(s) for s in dataset.samples(tokenizer, length=8, count=16, seed=0)]
    assert len(samples) == 16
    assert len(set(samples)) > 1


def test_too_little_text_for_the_samples(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset = TextFiles(Params(write(tmp_path / "a.txt", "x" * 35), order="sequential"))
    with pytest.raises(QplugError, match="3 samples of 10 tokens, 4 are needed"):
        dataset.samples(tokenizer, length=10, count=4, seed=0)
    with pytest.raises(QplugError, match="has 35 tokens, fewer than one window of 36"):
        dataset.samples(tokenizer, length=36, count=1, seed=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: no text in it"),
        ("a.txt", b" \n\n", "a.txt: no text in it"),
        ("a.jsonl", b"\n\n", "a.jsonl: no text in it"),
        ("a.txt", b"caf\xe9", "a.txt: not UTF-8, at byte 3: save it as UTF-8"),
        ("model.bin", b"PK\0\x01", "model.bin: not a text file: it has a zero byte"),
        ("a.jsonl", b'"one"\n{"text"}\n', "a.jsonl:2: not JSON: "),
        (
            "a.jsonl",
            b'"one"\n\n{"body": "x", "n": 1}',
            "a.jsonl:3: no field 'text'; its fields: 'bo",
        ),
        (
            "a.jsonl",
            b'{"text": 5}',
            "a.jsonl:1: must be a string, or an object whose 'text' is one",
        ),
        ("a.jsonl", b"[1]", "a.jsonl:1: must be a string"),
        ("a.json", b"{}", "a.json: must hold a list of strings, or of objects with 'text'"),
        ("a.json", b'["x", {"y": 1}]', "a.json: item 2: no field 'text'; its fields: 'y'"),
        ("a.json", b"[", "a.json: not JSON: "),
    ],
)
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(QplugError) as caught:
        read(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / message))
    assert "\n" not in str(caught.value)


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(QplugError, match="no such file or folder"):
        read(tmp_path / "calib.txt")
    with pytest.raises(QplugError, match=r"no \.txt, \.md, \.jsonl file in it"):
        read(tmp_path)


def test_an_unreadable_file_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, flags: int) -> int:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "a.txt", "text")
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(QplugError, match=r"a\.txt: cannot be read: Permission denied"):
        read(path)


def test_the_home_folder_may_be_abbreviated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.txt", "text")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert read(Path("~/a.txt")) == ["text"]


def test_the_path_is_required() -> None:
    with pytest.raises(QplugError, match="dataset text needs the option path"):
        fill(Params, {}, "dataset text")


# --- conversations --------------------------------------------------------------------------------


def conversations(path: Path, **options: Any) -> list[Conversation]:
    found = [*TextFiles(Params(path, **options)).documents("calibration")]
    assert all(isinstance(conversation, Conversation) for conversation in found)
    return found  # type: ignore[return-value]


def test_an_object_with_messages_is_a_conversation(tmp_path: Path, write_chats: WriteChats) -> None:
    chat = turns("Hi", "Ho")
    tool = {"type": "function", "function": {"name": "look"}}
    own = {"messages": chat, "tools": [tool], "chat_template_kwargs": {"enable_thinking": False}}
    path = write_chats(chat, own)
    first, second = conversations(path, template_kwargs="enable_thinking=true,words=two words,n=3")
    assert first.messages == second.messages == tuple(chat)
    assert (first.tools, second.tools) == ((), (tool,))
    assert first.template_options == {"enable_thinking": True, "words": "two words", "n": 3}
    assert second.template_options == {"enable_thinking": False, "words": "two words", "n": 3}
    assert second.where == f"{path}:2"
    (json_file := tmp_path / "chats.json").write_text(json.dumps([own]))
    (only,) = conversations(json_file, template_kwargs='{"a": [1]}')
    assert only.where == f"{json_file}: item 1"
    assert only.template_options == {"a": [1], "enable_thinking": False}


def test_a_text_beside_messages_is_still_read_as_text(write_chats: WriteChats) -> None:
    assert read(write_chats({"text": "one", "messages": turns("Hi")})) == ["one"]


def test_texts_become_messages_of_a_role(tmp_path: Path) -> None:
    path = write(tmp_path / "samples.json", '[{"question": "one"}, "two"]')
    first, second = conversations(
        path, field="question", role="user", template_kwargs="enable_thinking=false"
    )
    assert first.messages == ({"role": "user", "content": "one"},)
    assert second.messages == ({"role": "user", "content": "two"},)
    assert first.template_options == {"enable_thinking": False}
    assert first.where == str(path)


def test_samples_of_conversations_come_in_their_order(write_chats: WriteChats) -> None:
    path = write_chats(*(turns(f"question {n}", "Ho") for n in range(8)))

    def drawn(seed: int, order: str = "random") -> list[str]:
        dataset = TextFiles(fill(Params, {"path": str(path), "order": order}, "dataset text"))
        render = Renderer(chat_tokenizer(GENERATION))
        samples = draw(dataset, render, "dataset", length=40, count=4, seed=seed)
        return [str(render.tokenizer.decode(sample.tokens))[6:16] for sample in samples]

    assert drawn(0, "sequential") == [f"question {n}" for n in range(4)]
    assert drawn(0) == drawn(0) != drawn(1)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": []}, ": messages must be a list of one message or more"),
        ({"messages": ["Hi"]}, ": message 1: must be an object with a role"),
        ({"messages": [{"role": "user", "content": 5}]}, ": message 1: its content must be a str"),
        (
            {"messages": [*turns("Hi"), {"role": "user", "content": [{"text": "x"}]}]},
            ": message 2: parts of its content must be objects with a type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
            ": message 1: the text of a part of its content must be a string",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": "x"}]},
            ": message 1: its tool_calls must be a list of objects",
        ),
        ({"messages": turns("Hi"), "tools": "x"}, ": tools must be a list of objects"),
        (
            {"messages": turns("Hi"), "chat_template_kwargs": 1},
            ": chat_template_kwargs must be an object",
        ),
    ],
)
def test_a_conversation_of_another_form_is_one_line(
    write_chats: WriteChats, record: dict[str, Any], message: str
) -> None:
    path = write_chats(turns("Hi"), record)
    with pytest.raises(QplugError) as caught:
        conversations(path)
    assert str(caught.value).startswith(f"{path}:2{message}")


def test_texts_and_conversations_in_one_dataset_are_refused(write_chats: WriteChats) -> None:
    with pytest.raises(QplugError, match="has both texts and conversations: keep them in two"):
        read(write_chats(turns("Hi"), {"text": "one"}))


@pytest.mark.parametrize("options", ["enable_thinking", "=1", "{"])
def test_template_kwargs_of_another_form(write_chats: WriteChats, options: str) -> None:
    with pytest.raises(QplugError, match="dataset text: template_kwargs="):
        read(write_chats(turns("Hi")), template_kwargs=options)
