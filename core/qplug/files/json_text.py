"""Parses JSON that somebody else wrote: nothing but JSON of a sane size, depth and numbers."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn

from qplug.errors import QplugError
from qplug.files.regular import read_text

#: The longest file of JSON, in bytes. The index of a trillion parameters in experts has 15 MiB.
MAX_BYTES = 64 << 20
#: The most values in a text. One takes up to 200 bytes in memory.
MAX_VALUES = 5_000_000
#: The most lists and mappings around a value. Files of models have up to 10.
MAX_DEPTH = 64
#: The most digits of a whole number; tokenizer_config.json writes 1e30 with 31.
MAX_DIGITS = 64


def read_json(path: Path, *, within: Path | None = None, strict: bool = True) -> dict[str, Any]:
    """Returns the mapping in a JSON file, which must not be a link out of the folder ``within``.

    ``strict``: see ``parse_json``. Raises QplugError if the file is missing, is not a regular
    file, is longer than ``MAX_BYTES``, or does not hold a mapping in JSON.
    """
    try:
        text = read_text(path, MAX_BYTES, within=within)
    except FileNotFoundError:
        raise QplugError(f"{path.parent}: has no {path.name}") from None
    content = parse_json(text, f"{path}: cannot be read", strict=strict)
    if not isinstance(content, dict):
        raise QplugError(f"{path}: is not a JSON mapping")
    return content


def parse_json(text: str | bytes, where: str, *, strict: bool = True) -> Any:
    """Returns the value in ``text``.

    Raises QplugError, which begins with ``where``, if the text is not JSON, or has more than
    ``MAX_VALUES`` values, lists within lists of more than ``MAX_DEPTH``, numbers of more than
    ``MAX_DIGITS`` digits, or half of a surrogate pair. ``strict`` refuses numbers that JSON does
    not have (NaN, infinities) and mappings that have a key twice, too: configurations of models
    have both.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        if text.count(",") + text.count("[") + text.count("{") > MAX_VALUES:
            raise ValueError(f"it has more than {MAX_VALUES} values")
        if strict:
            value = json.loads(text, parse_constant=_refuse, object_pairs_hook=_mapping)
        else:
            value = json.loads(text)
        _check(value, finite=strict, halves=_may_have_halves(text))
    except RecursionError:
        raise QplugError(f"{where}: its values are nested more than {MAX_DEPTH} deep") from None
    except UnicodeDecodeError as error:
        raise QplugError(f"{where}: not UTF-8, at byte {error.start}") from error
    except ValueError as error:
        raise QplugError(f"{where}: {_reason(error)}") from error
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it has the key {twice!a} twice; remove one")
    return mapping


def _check(value: Any, *, finite: bool, halves: bool) -> None:
    """Raises ValueError for a value, at any depth, that no file of a model has.

    ``halves``: strings may hold half of a surrogate pair.
    """
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        if not level:
            return
        inner: list[Any] = []
        for item in level:  # nearly all are strings or small numbers, a million in some files
            if isinstance(item, str):
                if halves:
                    _refuse_half(item)
            elif isinstance(item, dict):
                inner.extend(item)
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
            elif isinstance(item, float):
                if finite and not math.isfinite(item):
                    raise ValueError("it has a number that is too large")
            elif isinstance(item, int) and abs(item) >= _TOO_LARGE:
                raise ValueError(f"it has a number of more than {MAX_DIGITS} digits")
        level = inner
    raise ValueError(f"its values are nested more than {MAX_DEPTH} deep")


def _may_have_halves(text: str) -> bool:
    """Whether ``text`` holds or names a surrogate, of which a string may have one half alone."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return _SURROGATE.search(text) is not None


def _refuse_half(value: str) -> None:
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"{value[:40]!a} has half of a surrogate pair")


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # as JSON names it
_TOO_LARGE = 10**MAX_DIGITS


def _reason(error: ValueError) -> str:
    """The message of ``error``; Python's own on long numbers tells how to change Python."""
    text = str(error)
    if "integer string conversion" in text:
        return f"it has a number of more than {MAX_DIGITS} digits"
    return text
