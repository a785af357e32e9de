"""Says which places in an engine's source, on which qplug's tables rest, changed in a new version.

``python tools/engine_anchors.py sglang 0.5.24`` downloads the wheel with pip; a path of a wheel or
of a folder that has the package, such as site-packages, is read as it is. Nothing is imported.

engine_anchors.json has the places: a file, a name in it, what rests on it, and what each recorded
version has there. A function, class or value is compared by its syntax tree without docstrings, so
comments and layout do not count. ``--diff OLD`` shows what changed since OLD, another version or
path; ``--record`` adds what was found to the file. The exit status is 1 if a place changed.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ANCHORS = Path(__file__).with_suffix(".json")

#: The kinds of wheels that pip may take, the usual ones first.
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_31_x86_64", "manylinux_2_34_x86_64")
_PYTHON = "3.12"
#: How many places are named where a name may have gone.
_MOVED = 3

#: What a version has at a place: a hash, the files that have a word, or None for nothing.
Found = str | list[str] | None


# --- a package -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Package:
    """The Python files of a package, by path (``vllm/model_executor/...``), and its version."""

    version: str
    files: Mapping[str, str]


def read_package(engine: str, source: str) -> Package:
    """Reads the package ``engine`` from ``source``: a wheel, a folder, or a version for pip."""
    path = Path(source)
    if path.is_dir():
        files = {
            str(file.relative_to(path)): file.read_text("utf-8", "replace")
            for file in sorted((path / engine).rglob("*.py"))
        }
        found = sorted(path.glob(f"{engine}*-*.dist-info"))
        version = found[0].name.removesuffix(".dist-info").rpartition("-")[2] if found else "here"
        return Package(version, files)
    if path.suffix == ".whl":
        return _read_wheel(engine, path)
    with tempfile.TemporaryDirectory(prefix="engine-wheel-") as folder:
        platforms = [word for name in _PLATFORMS for word in ("--platform", name)]
        words = ["--no-deps", "--only-binary=:all:", "--python-version", _PYTHON, *platforms]
        wanted = f"{engine}=={source}"
        pip = [sys.executable, "-m", "pip", "-q", "download", *words, "-d", folder, wanted]
        subprocess.run(pip, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        return _read_wheel(engine, wheel)


def _read_wheel(engine: str, path: Path) -> Package:
    with zipfile.ZipFile(path) as wheel:
        names = [n for n in wheel.namelist() if n.startswith(f"{engine}/") and n.endswith(".py")]
        files = {name: wheel.read(name).decode("utf-8", "replace") for name in sorted(names)}
    return Package(path.name.split("-")[1], files)


# --- a place -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Anchor:
    """A place: ``name`` in ``file`` (``Class.method``, or a value of the module; "" for the file).

    With ``word`` the place is all files below the folder ``file`` that have the word. ``rests``
    says what rests on it. ``known`` is what recorded versions have there, by version.
    """

    file: str
    name: str
    rests: str
    word: str = ""
    known: Mapping[str, Found] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.file} {self.name or self.word}".rstrip()

    def found(self, package: Package) -> Found:
        """What ``package`` has at this place."""
        if self.word:
            pattern = re.compile(rf"\b{re.escape(self.word)}\b")
            inside = (file for file in package.files if file.startswith(f"{self.file}/"))
            return [file for file in inside if pattern.search(package.files[file])]
        node = self.node(package)
        return None if node is None else hashlib.sha256(_plain(node).encode()).hexdigest()[:16]

    def node(self, package: Package) -> ast.AST | None:
        """The syntax tree at this place; None if there is none."""
        text = package.files.get(self.file)
        return None if text is None else _named(ast.parse(text), self.name)


def _named(tree: ast.AST, name: str) -> ast.AST | None:
    """The definition or assignment of ``name`` (``Class.method``) in ``tree``."""
    node: ast.AST | None = tree
    for part in name.split(".") if name else ():
        body = getattr(node, "body", ())
        node = next((each for each in _statements(body) if part in _names(each)), None)
    return node


def _statements(body: Any) -> Iterator[ast.stmt]:
    """The statements of ``body``, also those under a condition."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try):
            yield from _statements([*statement.body, *statement.orelse])


def _names(statement: ast.stmt) -> list[str]:
    """The names that ``statement`` gives a definition or a value."""
    if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [statement.name]
    if isinstance(statement, ast.Assign):
        return [target.id for target in statement.targets if isinstance(target, ast.Name)]
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return [statement.target.id]
    return []


def _plain(node: Any) -> str:
    """A tree as text, without docstrings and places, alike in every version of Python."""
    if isinstance(node, list):
        return "[" + ",".join(_plain(each) for each in node) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = []
    for name in node._fields:
        value = getattr(node, name, None)
        if name == "body" and isinstance(value, list):
            value = _without_docstring(value)
        if value not in (None, []) and name not in ("ctx", "kind", "type_comment"):
            parts.append(f"{name}={_plain(value)}")
    return f"{type(node).__name__}({','.join(parts)})"


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    """``body`` without the text that it begins with."""
    first = body[0] if body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        return body[1:] if isinstance(first.value.value, str) else body
    return body


def elsewhere(anchor: Anchor, package: Package) -> list[str]:
    """The files in which a definition has the outermost name of ``anchor``."""
    outer = re.escape(anchor.name.partition(".")[0])
    pattern = re.compile(rf"^(class|def|async def) {outer}\b|^{outer}\b.*=", re.MULTILINE)
    hits = (file for file, text in package.files.items() if anchor.name and pattern.search(text))
    return [file for file in hits if file != anchor.file]


# --- all places ----------------------------------------------------------------------------------


def read_anchors(engine: str, path: Path = ANCHORS) -> list[Anchor]:
    """The places of ``engine`` in the file ``path``."""
    return [Anchor(**each) for each in json.loads(path.read_text("utf-8"))[engine]]


def versions(anchors: list[Anchor]) -> list[str]:
    """The recorded versions, in the order of their numbers."""
    names = {version for anchor in anchors for version in anchor.known}
    return sorted(names, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])


def report(anchors: list[Anchor], package: Package, before: str) -> tuple[list[str], bool]:
    """Lines about places that changed since the version ``before``; and whether any did.

    Places that ``before`` does not have recorded are left out of the comparison.
    """
    counts: dict[str, int] = {}
    lines = []
    for anchor in anchors:
        if before not in anchor.known:
            continue
        old, new = anchor.known[before], anchor.found(package)
        state = _state(old, new)
        counts[state] = counts.get(state, 0) + 1
        if state == "same":
            continue
        lines += [f"{state:<8} {anchor}", f"         rests on it: {anchor.rests}"]
        if isinstance(old, list) and isinstance(new, list):
            lines += [f"         + {file}" for file in new if file not in old]
            lines += [f"         - {file}" for file in old if file not in new]
        elif new is None and (moved := elsewhere(anchor, package)):
            lines.append(f"         the name is in {', '.join(moved[:_MOVED])}")
    told = ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "none"
    lines.append(f"{package.version} against {before}: {told}")
    return lines, any(state != "same" for state in counts)


def _state(old: Found, new: Found) -> str:
    if old == new:
        return "same"
    return "new" if old is None else "gone" if new is None else "changed"


def differences(anchors: list[Anchor], old: Package, new: Package) -> Iterator[str]:
    """Yields a unified diff of each place that differs, of source without comments."""
    for anchor in anchors:
        trees = [anchor.node(package) for package in (old, new)]
        before, after = ("" if tree is None else ast.unparse(tree) for tree in trees)
        if anchor.word or before == after:
            continue
        heads = (f"{old.version}/{anchor}", f"{new.version}/{anchor}")
        lines = (before.splitlines(), after.splitlines())
        yield from difflib.unified_diff(lines[0], lines[1], *heads, lineterm="", n=2)


def record(engine: str, package: Package, path: Path = ANCHORS) -> None:
    """Writes what ``package`` has at each place into the file ``path``."""
    held = json.loads(path.read_text("utf-8"))
    for told, anchor in zip(held[engine], read_anchors(engine, path), strict=True):
        told["known"] = {**anchor.known, package.version: anchor.found(package)}
    path.write_text(json.dumps(held, indent=1) + "\n", "utf-8")


def main(words: list[str] | None = None) -> int:
    """Reads the command line, and prints the report; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("engine", choices=[*json.loads(ANCHORS.read_text("utf-8"))])
    parser.add_argument("source", help="a version for pip, a wheel, or a folder with the package")
    parser.add_argument("--against", metavar="V", help="a recorded version; default: the newest")
    parser.add_argument(
        "--diff", metavar="OLD", help="show what changed since this version or path"
    )
    parser.add_argument("--record", action="store_true", help="add this version to the file")
    told = parser.parse_args(words)
    package = read_package(told.engine, told.source)
    anchors = read_anchors(told.engine)
    if told.diff:
        print("\n".join(differences(anchors, read_package(told.engine, told.diff), package)))
    if told.record:
        record(told.engine, package)
        anchors = read_anchors(told.engine)
    others = [version for version in versions(anchors) if version != package.version]
    before = told.against or next(reversed(others), "")
    lines, changed = report(anchors, package, before)
    print("\n".join(lines))
    return int(changed)


if __name__ == "__main__":
    sys.exit(main())
