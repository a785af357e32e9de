"""Reads the user's own files unchanged: no blank is stripped, no newline is translated."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from qplug import Conversation, Dataset, Param, QplugError
from qplug.text import parse_json, read_text_file
from qplug_text.chat_records import conversation

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from qplug import Split, Tokenizer

#: Suffixes of the files to read in a folder. A .json file is read only if ``path`` names it, since
#: most .json files are not text.
_SUFFIXES = (".txt", ".md", ".jsonl")


@dataclass(frozen=True)
class Params:
    """The options of the dataset ``text``."""

    path: Annotated[
        Path,
        Param(
            "A file or a folder. A file is one document, unless it is .jsonl or .json. In a "
            "folder all .txt, .md and .jsonl files are read, in the order of their names."
        ),
    ]
    order: Annotated[
        Literal["random", "sequential"],
        Param("Take samples at random places of the text, or in sequence from its start."),
    ] = "random"
    field: Annotated[
        str,
        Param(
            "The key of the text in the objects of .jsonl and .json files; without it, an object "
            "is a conversation: messages and tools, as in requests to the OpenAI API."
        ),
    ] = "text"
    role: Annotated[
        str,
        Param(
            "Make each text the message of this role, such as user, in a conversation of its own; "
            "by default a text stays as it is."
        ),
    ] = ""
    template_kwargs: Annotated[
        str,
        Param(
            "Variables of the chat template, as enable_thinking=true,other=1, or a JSON object; "
            "chat_template_kwargs of a conversation has its own."
        ),
    ] = ""
    pictures: Annotated[
        Path | None,
        Param(
            "The folder of the pictures that conversations name; by default the folder of the file."
        ),
    ] = None


class TextFiles(Dataset[Params]):
    """Your own text or chats: a txt, md, jsonl or json file, or a folder of such files.

    Calibration and evaluation read the same text.
    """

    name = "text"
    Params = Params

    def documents(self, split: Split) -> Iterator[str] | Iterator[Conversation]:
        path = self.params.path.expanduser()
        records = list(self._records(path))
        texts = [record for record in records if isinstance(record, str)]
        conversations = [record for record in records if isinstance(record, Conversation)]
        if texts and conversations:
            raise QplugError(
                f"{path}: has both texts and conversations: keep them in two files, and mix them: "
                "--dataset a=text+b=text --dataset-opt a.path=FILE --dataset-opt b.path=FILE"
            )
        if conversations:
            return iter(conversations)
        if not any(text.strip() for text in texts):
            raise QplugError(f"{path}: no text in it")
        return iter(texts)

    def _records(self, path: Path) -> Iterator[str | Conversation]:
        options, pictures = _variables(self.params.template_kwargs), self.params.pictures
        for file in _files(path):
            folder = file.parent if pictures is None else pictures.expanduser()
            for record in _read(file, self.params.field, options):
                if isinstance(record, Conversation):
                    yield replace(record, pictures=folder)
                elif self.params.role:
                    message = {"role": self.params.role, "content": record}
                    yield Conversation((message,), (), options, where=str(file))
                else:
                    yield record

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int
    ) -> Iterator[Tensor] | Iterator[Conversation]:
        # This imports torch, which listing datasets does not need.
        from qplug.text import first_windows, random_windows

        first = next(self._records(self.params.path.expanduser()), None)
        if isinstance(first, Conversation):
            conversations = [*self.documents("calibration")]
            if self.params.order == "random":
                random.Random(seed).shuffle(conversations)  # noqa: S311 - must be reproducible
            return cast("Iterator[Conversation]", iter(conversations))
        if self.params.order == "random":
            return random_windows(self, tokenizer, length=length, count=count, seed=seed)
        windows = first_windows(self, tokenizer, length=length, count=count, split="calibration")
        if len(windows) < count:
            raise QplugError(
                f"{self.params.path}: {len(windows)} samples of {length} tokens, {count} are "
                "needed: ask for fewer or shorter samples, or leave out order=sequential"
            )
        return iter(windows.unbind())


def _files(path: Path) -> list[Path]:
    """Returns the files to read in ``path``: the file itself, or text files in the folder."""
    if not os.path.lexists(path):  # unlike Path.exists(), does not raise on a name that is too long
        raise QplugError(f"{path}: no such file or folder")
    if not path.is_dir():
        return [path]
    names = sorted(
        file.relative_to(path).as_posix()
        for file in path.rglob("*")
        if file.suffix.lower() in _SUFFIXES and file.is_file()
    )
    # What editors and tools keep in hidden folders is not the user's text.
    names = [name for name in names if not any(p.startswith(".") for p in name.split("/"))]
    if not names:
        raise QplugError(f"{path}: no {', '.join(_SUFFIXES)} file in it")
    return [path / name for name in names]


def _read(file: Path, field: str, options: Mapping[str, Any]) -> Iterator[str | Conversation]:
    """Yields the documents in ``file``; in objects of JSON the text is under ``field``.

    ``options`` are variables of the chat template.
    """
    text = read_text_file(file)
    suffix = file.suffix.lower()
    if suffix == ".jsonl":
        # Only a line feed ends a line: splitlines would also split at characters that may stand
        # inside a JSON string.
        for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
            if line.strip():
                where = f"{file}:{number}"
                item = parse_json(line, f"{where}: not JSON", strict=False)
                yield _record(item, field, where, options)
    elif suffix == ".json":
        items = parse_json(text.removeprefix("\ufeff"), f"{file}: not JSON", strict=False)
        if not isinstance(items, list):
            raise QplugError(f"{file}: must hold a list of strings, or of objects with {field!r}")
        for number, item in enumerate(items, 1):
            yield _record(item, field, f"{file}: item {number}", options)
    else:
        yield text


def _record(item: Any, field: str, where: str, options: Mapping[str, Any]) -> str | Conversation:
    """Returns the text of a string, or of an object under ``field``, or a conversation."""
    if isinstance(item, dict):
        if field not in item and "messages" in item:
            return conversation(item, where, options)
        if field not in item:
            has = ", ".join(map(repr, item)) or "none"
            raise QplugError(f"{where}: no field {field!r}; its fields: {has}")
        item = item[field]
    if not isinstance(item, str):
        raise QplugError(f"{where}: must be a string, or an object whose {field!r} is one")
    return item


def _variables(text: str) -> Mapping[str, Any]:
    """Returns the variables that the option ``template_kwargs`` gives, by name."""
    where = f"dataset text: template_kwargs={text}"
    if text.lstrip().startswith("{"):
        return cast("dict[str, Any]", parse_json(text, where))
    variables: dict[str, Any] = {}
    for pair in filter(None, text.split(",")):
        name, equals, value = pair.partition("=")
        if not (name.strip() and equals):
            raise QplugError(f"{where}: write NAME=VALUE, with commas between, or a JSON object")
        try:
            variables[name.strip()] = parse_json(value, where)
        except QplugError:  # no number, true, false or null: a word
            variables[name.strip()] = value.strip()
    return variables
