"""A file of YAML costs no more than it shows, and a number in it is the number that one reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from qplug.errors import QplugError
from qplug.recipe.yaml_tree import MAX_BYTES, MAX_DEPTH, MAX_NODES, read_yaml

ALIASES = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 11)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 500))

REFUSED = {
    "aliases of aliases": (ALIASES, f"more than {MAX_NODES} values; use fewer aliases"),
    "a chain of aliases": (CHAIN, f"is nested more than {MAX_DEPTH} deep"),
    "lists within lists": ("[" * 5000, f"nested more than {MAX_DEPTH} deep"),
    "a long file": ("#" * (MAX_BYTES + 1), "is longer than 256 KiB"),
    "a list within itself": ("a: &a [*a]", "contains itself"),
    "a mapping merged into itself": ("a: &a {b: {<<: *a}}", "contains itself"),
    "a merged list": ("a: {<<: [1]}", "only mappings can be merged"),
    "a number of 5000 digits": ("a: " + "9" * 5000, "more than 64 digits"),
    "a number to the base of 8": ("a: 010", "010 is another number in YAML"),
    "a number to the base of 60": ("a: 12:30:45", "12:30:45 is another number in YAML"),
    "no such day": ("a: 2024-02-31", "'2024-02-31' is wrong"),
    "a tag of Python": ("a: !!python/object/apply:os.system [x]", "has the tag"),
    "a set": ("a: !!set {x}", "has the tag"),
    "a tag that does not fit": ("a: !!bool x", "'x' is wrong"),
    "a key that is a list": ("? [a]\n: 1", "a key must be a word"),
}


@pytest.mark.parametrize(("text", "complaint"), REFUSED.values(), ids=REFUSED)
def test_refused(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text(text)
    with pytest.raises(QplugError) as caught:
        read_yaml(tmp_path / "recipe.yml")
    assert str(caught.value).startswith(f"{tmp_path}/recipe.yml:")
    assert complaint in str(caught.value)


def test_merged_mappings(tmp_path: Path) -> None:
    # By merges of merges the entries would be 10 to the power of 14, if each were kept.
    text = "a0: &a0 {k: 0, l: 0}\n" + "".join(
        f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}], k: {n}}}\n" for n in range(1, 15)
    )
    (tmp_path / "recipe.yml").write_text(text + "b: {<<: [{x: 1}, {x: 2, y: 2}], y: 3}")
    plain = read_yaml(tmp_path / "recipe.yml").plain()
    assert plain["a14"] == {"k": 14, "l": 0}
    assert plain["b"] == {"x": 1, "y": 3}


def test_what_yaml_reads_as_text_or_number(tmp_path: Path) -> None:
    text = "a: 2024-01-01\nb: 1_000\nc: 0x10\nd: '010'\ne: 0.5\nf: 0"
    (tmp_path / "recipe.yml").write_text(text)
    read = read_yaml(tmp_path / "recipe.yml").plain()
    assert read == {"a": "2024-01-01", "b": 1000, "c": 16, "d": "010", "e": 0.5, "f": 0}


@pytest.mark.parametrize("text", [".nan", ".inf", "-.inf", "1e999"])
def test_what_is_no_number(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text(f"a: {text}")
    with pytest.raises(QplugError, match="is wrong; allowed: a number"):
        read_yaml(tmp_path / "recipe.yml").entries()["a"].number()
