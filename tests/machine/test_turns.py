"""Threads pass the interpreter on sooner while a model is quantized, and as before after it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import qplug
from qplug.machine.turns import short_turns


def test_turns_are_short_inside_and_as_before_after_it() -> None:
    before = sys.getswitchinterval()
    with short_turns():
        assert sys.getswitchinterval() == pytest.approx(5e-4)
    assert sys.getswitchinterval() == before


def test_a_run_has_short_turns(tmp_path: Path) -> None:
    seen: list[float] = []

    def watch(*_: Any) -> None:
        seen.append(sys.getswitchinterval())

    qplug.quantize("qplug:demo", tmp_path / "out", scheme="W4A16", watch=watch)
    assert seen
    assert max(seen) == pytest.approx(5e-4)
