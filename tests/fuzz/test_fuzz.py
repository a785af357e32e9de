"""Whatever a file holds, a command ends well or says in one line what is wrong with the file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz.fuzzer import Fuzzer

FEW, MANY = 200, 5000


def falls(root: Path, count: int, *, few: bool) -> Iterator[str]:
    fuzzer = Fuzzer(root, few=few)
    for number in range(count):
        fall = fuzzer.fall(number)
        if fall is not None:
            yield str(fall)


def test_a_few_hundred_damaged_files(tmp_path: Path) -> None:
    assert list(falls(tmp_path, FEW, few=True)) == []


@pytest.mark.slow
def test_thousands_of_damaged_files(tmp_path: Path) -> None:
    assert list(falls(tmp_path, MANY, few=False)) == []
