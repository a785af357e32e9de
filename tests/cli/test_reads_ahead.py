"""``qplug quantize`` reads the code of models ahead if the run needs it, and only then."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

OddModel = Callable[[str], Path]

#: Prints what is read ahead, in order, and whether the code of models was imported in the end.
PROGRAM = """
import sys

from qplug.machine import read_ahead

read = []
read_ahead._start = read.append
from qplug.cli.main import main

main(sys.argv[1:], standalone_mode=False)
print(dict.fromkeys(read).keys() - {"torch"}, "transformers.modeling_utils" in sys.modules)
"""
NEEDED, NOT_NEEDED = "{'models'} True", "set() False"
FEW = ("--samples", "2", "--seq-len", "32")


def read_and_imported(*words: str | Path, out: Path) -> str:
    command = [sys.executable, "-c", PROGRAM, "quantize", *map(str, words), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        # No algorithm is named, and rtn is chosen.
        (("--scheme", "W8A16", "--no-check"), NOT_NEEDED),
        (("--algo", "rtn", "--check", "--dry-run"), NOT_NEEDED),
        *(
            pytest.param(words, expected, marks=pytest.mark.slow)
            for words, expected in (
                # The ranges of inputs are measured.
                (("--algo", "rtn", "--scheme", "FP8", "--no-check", *FEW), NEEDED),
                # Another algorithm without data.
                (("--algo", "hqq", "--scheme", "W4A16", "--no-check"), NOT_NEEDED),
                # A rewrite is tried on a small copy.
                (("--algo", "quarot+rtn", "--no-check", "--dry-run"), NEEDED),
                (("--algo", "rtn", "--kv-cache", "fp8", "--no-check", "--dry-run"), NEEDED),
                (("--scheme", "W8A16", "--check"), NEEDED),
                (("--scheme", "W8A16", "--no-check", "--report"), NEEDED),
                # The search of schemes computes the float model.
                (("--scheme", "auto", "--bits", "5", "--no-check", "--dry-run", *FEW), NEEDED),
            )
        ),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, tuple) else "",
)
def test_what_the_run_needs_is_read(words: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    assert read_and_imported("qplug:demo", *words, out=tmp_path / "out") == expected


def test_a_model_that_only_its_code_describes_needs_it(odd_model: OddModel, tmp_path: Path) -> None:
    words = (odd_model("lfm2"), "--algo", "rtn", "--scheme", "W8A16", "--no-check")
    assert read_and_imported(*words, out=tmp_path / "out") == NEEDED
