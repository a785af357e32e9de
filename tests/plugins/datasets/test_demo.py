from __future__ import annotations

import ast
import sys
from typing import TYPE_CHECKING

import pytest

from qplug import NoParams, QplugError
from qplug.text import random_windows
from qplug_demo.python_text import Demo

if TYPE_CHECKING:
    from pathlib import Path

    from qplug import Tokenizer


@pytest.fixture
def demo() -> Demo:
    return Demo(NoParams())


def is_code(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def test_the_text_is_always_the_same(demo: Demo) -> None:
    assert list(demo.documents("calibration")) == list(Demo(NoParams()).documents("calibration"))


def test_it_is_about_a_megabyte(demo: Demo) -> None:
    calibration = sum(map(len, demo.documents("calibration")))
    evaluation = sum(map(len, demo.documents("evaluation")))
    assert 0.9e6 < calibration < 1.4e6
    assert 0.08 < evaluation / calibration < 0.2


def test_both_splits_have_prose_and_code(demo: Demo) -> None:
    for split in ("calibration", "evaluation"):
        code = [is_code(text) for text in demo.documents(split)]
        assert any(code)
        assert not all(code)


def test_no_paragraph_of_prose_is_in_both_splits(demo: Demo) -> None:
    def paragraphs(texts: list[str]) -> set[str]:
        prose = [text for text in texts if not is_code(text)]
        return {" ".join(p.split()) for text in prose for p in text.split("\n\n")}

    calibration = paragraphs(list(demo.documents("calibration")))
    evaluation = paragraphs(list(demo.documents("evaluation")))
    assert not calibration & evaluation


def test_samples(demo: Demo, tokenizer: Tokenizer) -> None:
    samples = list(random_windows(demo, tokenizer, length=2048, count=8, seed=0))
    assert [sample.shape for sample in samples] == [(2048,)] * 8


@pytest.mark.parametrize("gone", ["pydoc_data", "library"])
def test_a_python_without_the_text(
    demo: Demo, gone: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if gone == "pydoc_data":
        monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    else:
        monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(QplugError, match="this Python comes without") as caught:
        next(demo.documents("calibration"))
    assert "\n" not in str(caught.value)
    assert "--dataset text" in str(caught.value)
