"""Prints which linears an engine's source builds without quantization, and which it merges.

``python tools/built_float.py .../site-packages/vllm`` reads the source; nothing is imported. Its
lines are the material for two tables: ``qplug.model.kept_float`` and
``qplug_compressed_tensors.fusing``. For a new version compare its output with that of the last one.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

#: The folders of an engine that build the layers of models.
_PARTS = ("models", "layers")
#: A stacked parameter of a loader: the merged name, a member's name, and its place.
_TRIPLE = 3


def sources(engine: Path) -> Iterator[tuple[Path, ast.Module]]:
    """Yields the files of models and layers in the folder ``engine``, parsed."""
    for path in sorted(engine.rglob("*.py")):
        if any(part in _PARTS for part in path.relative_to(engine).parts):
            yield path.relative_to(engine), ast.parse(path.read_text("utf-8"))


def built_float(tree: ast.Module) -> Iterator[str]:
    """Yields ``line Class.attribute = Kind`` for each linear that gets no quant_config, or None."""
    for owner in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for node in ast.walk(owner):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                kind = ast.unparse(node.value.func)
                if kind.endswith("Linear") and _is_float(node.value):
                    target = ast.unparse(node.targets[0]).removeprefix("self.")
                    yield f"{node.lineno} {owner.name}.{target} = {kind}"


def _is_float(call: ast.Call) -> bool:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if None in given or any(isinstance(arg, ast.Starred) for arg in call.args):
        return False  # the keywords are in a dict, which may have a quant_config
    if "quant_config" not in given:
        return not any("quant_config" in ast.unparse(arg) for arg in call.args)
    value = given["quant_config"]
    return isinstance(value, ast.Constant) and value.value is None


def merged(tree: ast.Module) -> dict[str, list[str]]:
    """The members of merged matrices, by the name of the matrix, as loaders state them."""
    found: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Tuple | ast.List) and len(node.elts) == _TRIPLE:
            texts = [e.value for e in node.elts if isinstance(e, ast.Constant)]
            if len(texts) == _TRIPLE and isinstance(texts[0], str) and isinstance(texts[1], str):
                found.setdefault(texts[0].strip("."), []).append(texts[1].strip("."))
        for name, members in _packed(node):
            found.setdefault(name, []).extend(members)
    return {name: list(dict.fromkeys(members)) for name, members in found.items()}


def _packed(node: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """Yields the rows of ``packed_modules_mapping`` if ``node`` assigns it."""
    if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)):
        return
    if ast.unparse(node.targets[0]).endswith("packed_modules_mapping"):
        for key, value in zip(node.value.keys, node.value.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(value, ast.List):
                yield (
                    str(key.value),
                    [str(e.value) for e in value.elts if isinstance(e, ast.Constant)],
                )


def main() -> None:
    """Prints a line for each linear, then a line for each set of members and its matrix."""
    rows: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for path, tree in sources(Path(sys.argv[1])):
        for line in built_float(tree):
            print(f"float: {path}:{line}")
        for name, members in merged(tree).items():
            rows.setdefault((name, tuple(sorted(members))), []).append(path.name)
    for (name, members), files in sorted(rows.items()):
        if len(members) > 1:
            print(f"merged: {name} <- {', '.join(members)} ({len(files)}: {files[0]})")


if __name__ == "__main__":
    main()
