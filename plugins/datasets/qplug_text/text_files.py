"""Reads the user's own files unchanged: no blank is stripped, no newline is translated."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from qplug import Dataset, Param, QplugError
from qplug.text import parse_json, read_text_file

if TYPE_CHECKING:
    from collections.abc import Iterator

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
        str, Param("The key of the text in the objects of .jsonl and .json files.")
    ] = "text"


class TextFiles(Dataset[Params]):
    """Your own text: a txt, md, jsonl or json file, or a folder of such files.

    Calibration and evaluation read the same text.
    """

    name = "text"
    Params = Params

    def documents(self, split: Split) -> Iterator[str]:
        path = self.params.path.expanduser()
        texts = [text for file in _files(path) for text in _read(file, self.params.field)]
        if not any(text.strip() for text in texts):
            raise QplugError(f"{path}: no text in it")
        return iter(texts)

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int
    ) -> Iterator[Tensor]:
        # This imports torch, which listing datasets does not need.
        from qplug.text import first_windows, random_windows

        if self.params.order == "random":
            return random_windows(self, tokenizer, length=length, count=count, seed=seed)
        windows = first_windows(self, tokenizer, length=length, count=count, split="calibration")
        if len(windows) < count:
            raise QplugError(
                f"{self.params.path}: {len(windows)} samples of {length} tokens, {count} are "
                "needed: ask for fewer or shorter samples, or leave out order=sequential"
            )
        return iter(windows)


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


def _read(file: Path, field: str) -> Iterator[str]:
    """Yields the documents in ``file``; in objects of JSON the text is under ``field``."""
    text = read_text_file(file)
    suffix = file.suffix.lower()
    if suffix == ".jsonl":
        # Only a line feed ends a line: splitlines would also split at characters that may stand
        # inside a JSON string.
        for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
            if line.strip():
                where = f"{file}:{number}"
                yield _text_of(parse_json(line, f"{where}: not JSON", strict=False), field, where)
    elif suffix == ".json":
        items = parse_json(text.removeprefix("\ufeff"), f"{file}: not JSON", strict=False)
        if not isinstance(items, list):
            raise QplugError(f"{file}: must hold a list of strings, or of objects with {field!r}")
        for number, item in enumerate(items, 1):
            yield _text_of(item, field, f"{file}: item {number}")
    else:
        yield text


def _text_of(item: Any, field: str, where: str) -> str:
    """Returns the text of a string, or of an object under ``field``."""
    if isinstance(item, dict):
        if field not in item:
            has = ", ".join(map(repr, item)) or "none"
            raise QplugError(f"{where}: no field {field!r}; its fields: {has}")
        item = item[field]
    if not isinstance(item, str):
        raise QplugError(f"{where}: must be a string, or an object whose {field!r} is one")
    return item
