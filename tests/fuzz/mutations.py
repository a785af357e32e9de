"""Changes of files that somebody could make by mistake or in malice, drawn at random."""

from __future__ import annotations

import json
import os
import random
import socket
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

#: Values in place of others in a tree of JSON or YAML.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**31, 2**31 - 1, 2**32, 2**63, -(2**63), 10**9),
    *(10**30, 0.5, -0.0, 1e-320, 1e308, -1e308, float("nan"), float("inf"), "", "x", "0", "true"),
    *("nonsense", "a" * 5000, "../../etc/passwd", "/dev/zero", "a\0b", "\x1b]0;pwn\x07", "`x`"),
    *("\ud800", "é\u202e", "-1", "re:(", "re:.*", "*", "{}", [], {}, [[]], [None], [1, 2], ["x"]),
    *({"a": 1}, {"": None}, [[[[[[[]]]]]]], {"a": {"b": {"c": []}}}, ["x"] * 1000, "None"),
)

#: Texts in place of a whole file.
WHOLE: tuple[bytes, ...] = (
    *(b"", b"{}", b"[]", b"null", b"1", b'"x"', b"NaN", b"true", b"\n\n", b"{", b"\0" * 100),
    *(b"[" * 100_000, b'{"a":' * 20_000, b"[" * 900 + b"]" * 900, b"9" * 5000, b"-Infinity"),
    *(
        b'{"a": ' + b"1" * 5000 + b"}",
        b"\xff\xfe\x00",
        b"\xef\xbb\xbf{}",
        b"\x80\x04K*.",
        b"PK\3\4",
    ),
    *("{}".encode("utf-16"), b'{"a": 1, "a": 2}', b'{"\\ud800": "\\udfff"}', b"[1e999]"),
    *(b"[" + b"[]," * 500_000 + b"[]]", b"a: &a [*a]", b"{}" * 1000, b"<html></html>"),
)


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the path of a socket has at most 100 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def _sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


#: Files that no reader may open, or not as a whole.
Special = Callable[[Path], object]
SPECIALS: dict[str, Special] = {
    "/dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "/dev/urandom": lambda path: path.symlink_to("/dev/urandom"),
    "/dev/null": lambda path: path.symlink_to("/dev/null"),
    "/dev/tty": lambda path: path.symlink_to("/dev/tty"),
    "/proc": lambda path: path.symlink_to("/proc/self/status"),
    "a file of the system": lambda path: path.symlink_to("/etc/passwd"),
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a socket": _socket,
    "a loop": lambda path: path.symlink_to(path.name),
    "nowhere": lambda path: path.symlink_to("missing"),
    "nothing": lambda path: None,
    "a link to a pipe": lambda path: (os.mkfifo(f"{path}.p"), path.symlink_to(f"{path.name}.p")),
    "64 GiB": lambda path: _sparse(path, 1 << 36),
    "600 MiB": lambda path: _sparse(path, 600 << 20),
}


# --- bytes ----------------------------------------------------------------------------------------


def change_bytes(raw: bytes, draw: random.Random) -> bytes:
    """``raw`` with bits flipped, cut, repeated, or with other bytes in it."""
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        raw = draw.choice(_BYTES)(raw, draw)
    return raw


def _flip(raw: bytes, draw: random.Random) -> bytes:
    if not raw:
        return b"x"
    changed = bytearray(raw)
    changed[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _cut(raw: bytes, draw: random.Random) -> bytes:
    return raw[: draw.randrange(len(raw) + 1)]


def _lose(raw: bytes, draw: random.Random) -> bytes:
    first = draw.randrange(len(raw) + 1)
    return raw[:first] + raw[first + draw.randrange(1, 50) :]


def _repeat(raw: bytes, draw: random.Random) -> bytes:
    first = draw.randrange(len(raw) + 1)
    piece = raw[first : first + draw.randrange(1, 200)]
    return raw[:first] + piece * draw.choice((2, 3, 100)) + raw[first:]


def _insert(raw: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(raw) + 1)
    other = draw.choice((*WHOLE[:20], b",", b"}", b"]", b'"', b":", b"\n", b"\xff", b"-", b"e9"))
    return raw[:place] + other + raw[place:]


_BYTES = (_flip, _flip, _cut, _lose, _repeat, _insert)


# --- trees ----------------------------------------------------------------------------------------


def change_tree(tree: Any, draw: random.Random) -> Any:
    """``tree``, of lists and mappings, with some values or keys replaced, moved or taken away."""
    tree = deepcopy(tree)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            return draw.choice(VALUES)
        # Places near the top are as likely as the many inside.
        depth = draw.choice(sorted({depth for depth, _, _ in places}))
        _, owner, key = draw.choice([place for place in places if place[0] == depth])
        draw.choice(_TREE)(owner, key, draw)
    return tree


def _places(tree: Any, depth: int = 0) -> Any:
    if isinstance(tree, dict):
        for key, inner in tree.items():
            yield depth, tree, key
            yield from _places(inner, depth + 1)
    elif isinstance(tree, list):
        for index, inner in enumerate(tree[:50]):
            yield depth, tree, index
            yield from _places(inner, depth + 1)


def _replace(owner: Any, key: Any, draw: random.Random) -> None:
    owner[key] = deepcopy(draw.choice(VALUES))


def _wrap(owner: Any, key: Any, draw: random.Random) -> None:
    owner[key] = draw.choice(([owner[key]], {"x": owner[key]}, str(owner[key]), [owner[key]] * 2))


def _nest(owner: Any, key: Any, draw: random.Random) -> None:
    for _ in range(draw.choice((10, 100, 800))):
        owner[key] = [owner[key]]


def _remove(owner: Any, key: Any, draw: random.Random) -> None:
    del owner[key]


def _rename(owner: Any, key: Any, draw: random.Random) -> None:
    if isinstance(owner, dict):
        owner[draw.choice(("", "x", f"{key}x", "a" * 5000, "\x1b[2J", "__class__"))] = owner.pop(
            key
        )


def _move(owner: Any, key: Any, draw: random.Random) -> None:
    if isinstance(owner, dict):
        other = draw.choice(list(owner))
        owner[key], owner[other] = owner[other], owner[key]


def _multiply(owner: Any, key: Any, draw: random.Random) -> None:
    if isinstance(owner[key], (int, float)):
        owner[key] = owner[key] * draw.choice((-1, 2, 3, 1000, 10**6, 10**12, 0.5)) + draw.choice(
            (0, 1)
        )
    else:
        _replace(owner, key, draw)


_TREE = (_replace, _replace, _replace, _replace, _wrap, _nest, _remove, _rename, _move, _multiply)


def change_json(raw: bytes, draw: random.Random) -> bytes:
    """A file of JSON with its tree changed, or its bytes."""
    if draw.random() < 0.25:
        return change_bytes(raw, draw)
    text = json.dumps(change_tree(json.loads(raw), draw))
    return text.encode("utf-8", "replace")


def change_header(raw: bytes, draw: random.Random) -> bytes:
    """A safetensors file with its header changed, or the length of it, or any byte."""
    length = int.from_bytes(raw[:8], "little")
    kind = draw.random()
    if kind < 0.15:
        length = draw.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, 10**8))
        return length.to_bytes(8, "little") + raw[8:]
    if kind < 0.25:
        return change_bytes(raw[: 8 + length], draw) + raw[8 + length :]
    if kind < 0.3:
        return raw[: draw.randrange(len(raw))]
    header = raw[8 : 8 + length]
    header = draw.choice(WHOLE) if kind < 0.4 else change_json(header, draw)
    return len(header).to_bytes(8, "little") + header + raw[8 + length :]


# --- YAML -----------------------------------------------------------------------------------------

SCALARS = (
    *("010", "12:30:45", "2024-01-01", "2024-99-99", "0x10", "1_000", "yes", "~", "!!int x"),
    *("!!python/object/apply:os.system [x]", "!!set {a}", "!!binary x", "*missing", "&a [*a]"),
    *(".nan", ".inf", "-1", "1e308", "1" * 5000, "[" * 3000, "{" * 3000, "[]", "{}", "'x'", "x: y"),
    *("|\n  x", "? a", "<<", "{<<: 1}", "\x1b", "\x00", "2147483648", "18446744073709551616"),
)


def change_yaml(raw: bytes, draw: random.Random) -> bytes:
    """A file of YAML with values replaced, with aliases of aliases before it, or other bytes."""
    kind = draw.random()
    if kind < 0.25:
        return change_bytes(raw, draw)
    if kind < 0.35:
        width, depth = draw.choice(((10, 10), (2, 40), (1, 600), (50, 5)))
        merge = draw.random() < 0.5
        first = "a0: &a0 {k: 1}\n" if merge else "a0: &a0 [x]\n"
        bomb = [first]
        for number in range(1, depth):
            names = ", ".join([f"*a{number - 1}"] * width)
            value = f"{{<<: [{names}], k{number}: 1}}" if merge else f"[{names}]"
            bomb.append(f"a{number}: &a{number} {value}\n")
        return "".join(bomb).encode() + raw
    lines = raw.decode().splitlines()
    for _ in range(draw.choice((1, 1, 2))):
        number = draw.randrange(len(lines))
        key, colon, _ = lines[number].partition(":")
        if colon:
            value = draw.choice((draw.choice(SCALARS), _dumped(draw)))
            lines[number] = f"{key}: {value}"
        else:
            lines[number] += draw.choice((" ", "  ", "\t", ":", " x: 1"))
    return "\n".join(lines).encode("utf-8", "replace")


def _dumped(draw: random.Random) -> str:
    return json.dumps(draw.choice(VALUES))[:6000]
