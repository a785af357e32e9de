"""Runs commands on damaged files in this process: each ends well, or says why in one line.

``python tests/fuzz/fuzzer.py --count 5000`` counts what does not.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from click.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parents[1]))
from fuzz.mutations import (
    SPECIALS,
    WHOLE,
    change_bytes,
    change_header,
    change_json,
    change_yaml,
)
from fuzz.seeds import Seed, make_seeds, other_dtype

SECONDS, BYTES = 60, 2 << 30

_CALIBRATION = ("--samples", "2", "--seq-len", "16", "--dataset", "text", "--dataset-opt", "TEXT")
_MEASURED = ("--windows", "1", "--seq-len", "16", "--dataset", "text", "--dataset-opt", "TEXT")
#: Commands on what is damaged, by its kind; each as often as it is written.
COMMANDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "float": (
        *[("quantize", "IT", "--out", "OUT", "--dry-run")] * 6,
        *[("inspect", "IT")] * 4,
        *[("quantize", "IT", "--out", "OUT", "--algo", "awq", "--dry-run", *_CALIBRATION)] * 3,
        *[("verify", "IT"), ("report", "IT", "--out", "PAGE"), ("compare", "IT", "--out", "PAGE")],
        ("serve", "IT", "--dry-run", "--backend", "vllm"),
        ("quantize", "IT", "--out", "OUT"),
        ("quantize", "IT", "--out", "OUT", "--algo", "awq", *_CALIBRATION),
        ("quantize", "IT", "--out", "OUT", "--algo", "quarot+gptq", *_CALIBRATION),
        ("eval", "IT", *_MEASURED),
        *[("plan", "IT", "--gpu", "H100x2")] * 3,
    ),
    "quantized": (
        *[("inspect", "IT")] * 4,
        *[("verify", "IT")] * 4,
        *[("serve", "IT", "--dry-run")] * 2,
        ("serve", "IT", "--dry-run", "--backend", "vllm"),
        ("report", "IT", "--out", "PAGE"),
        ("compare", "IT", "--out", "PAGE", "--json"),
        ("quantize", "IT", "--out", "OUT", "--dry-run"),
        ("eval", "IT", *_MEASURED),
        ("verify", "IT", "--against", "MODEL", *_MEASURED),
        ("plan", "IT", "--gpu", "4090"),
    ),
    "recipe": (
        *[("config", "check", "IT")] * 3,
        ("config", "convert", "IT"),
        ("quantize", "MODEL", "--config", "IT", "--out", "OUT", "--dry-run"),
    ),
    "text": (
        ("quantize", "MODEL", "--out", "OUT", "--algo", "awq", "--dry-run", *_CALIBRATION),
        ("eval", "MODEL", *_MEASURED),
    ),
}
#: Commands that read all weights, and compute with them.
HEAVY = ("quantize", "eval")
_DTYPES = (
    *(torch.float64, torch.float16, torch.float32, torch.uint16, torch.int8, torch.bool),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.int64),
)


@dataclass(frozen=True)
class Fall:
    """A case that did not end as it must: its number, the command, the damage, and what it did."""

    number: int
    words: tuple[str, ...]
    damage: str
    fault: str

    def __str__(self) -> str:
        return f"case {self.number}: {self.damage}: qplug {' '.join(self.words)}\n  {self.fault}"


class TooLong(BaseException):
    """A case took longer than ``SECONDS``; no handler of exceptions takes it for its own."""


class Fuzzer:
    """Cases by number: the same number is the same case."""

    def __init__(self, root: Path, seed: int = 0, *, few: bool = False) -> None:
        """``few``: few seeds, and no command that reads all weights."""
        self._root, self._seed, self._few = root, seed, few
        (root / "seeds").mkdir()
        self._seeds = make_seeds(root / "seeds", few=few)
        self._sound = root / "seeds" / "llama"

    def fall(self, number: int) -> Fall | None:
        """The fall of case ``number``; None if it ends as it must."""
        draw = random.Random(f"{self._seed} {number}")
        kind = draw.choice(
            ("float", "float", "quantized", "quantized", "quantized", "recipe", "text")
        )
        seed = draw.choice([seed for seed in self._seeds if seed.kind == kind])
        place = self._root / f"case{number}"
        place.mkdir()
        try:
            it, damage = self._damaged(seed, place, draw)
            words = self._words(draw.choice(self._commands(kind, number)), it, place)
            return self._run(number, words, damage, place)
        finally:
            shutil.rmtree(place)

    def _commands(self, kind: str, number: int) -> list[tuple[str, ...]]:
        """The commands for case ``number``: only one in four may be heavy."""
        heavy = not self._few and number % 4 == 0
        return [c for c in COMMANDS[kind] if heavy or c[0] not in HEAVY or "--dry-run" in c]

    def _damaged(self, seed: Seed, place: Path, draw: random.Random) -> tuple[Path, str]:
        """A copy of ``seed`` in ``place`` that is damaged, and the damage in words."""
        it = place / seed.path.name
        if not seed.files:
            raw = self._filled(seed.path.read_bytes(), place)
            it.write_bytes(raw)
            return it, f"{it.name}: {damage_file(it, draw)}"
        it.mkdir()
        for file in seed.path.iterdir():
            os.link(file, it / file.name)
        # Files that decide more are damaged more often.
        small = [name for name in seed.files if name in ("config.json", "qplug.json")]
        name = draw.choice((draw.choice(small), draw.choice(seed.files), draw.choice(seed.files)))
        return it, f"{seed.path.name}/{name}: {damage_file(it / name, draw)}"

    def _filled(self, raw: bytes, place: Path) -> bytes:
        text = self._root / "seeds" / "text.txt"
        for word, path in (("TEXT", text), ("MODEL", self._sound), ("OUT", place / "out")):
            raw = raw.replace(word.encode(), str(path).encode())
        return raw

    def _words(self, words: tuple[str, ...], it: Path, place: Path) -> tuple[str, ...]:
        text = it if it.name.startswith("text") else self._root / "seeds" / "text.txt"
        real = {"IT": it, "OUT": place / "out", "PAGE": place / "page.html", "MODEL": self._sound}
        real["TEXT"] = f"path={text}"  # type: ignore[assignment]
        device = ("--device", "cpu") if "eval" in words or "quantize" in words else ()
        return (*(str(real.get(word, word)) for word in words), *device)

    def _run(self, number: int, words: tuple[str, ...], damage: str, place: Path) -> Fall | None:
        before, began = {path.name for path in place.iterdir()}, time.monotonic()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            with _bounds():
                result = _invoke(words)
        except TooLong as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            return Fall(number, words, damage, f"over {SECONDS} s, in {where.name}")
        fault = _fault(result)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
        if grown > BYTES:
            fault = f"took {grown >> 20} MiB"
        left = sorted({path.name for path in place.iterdir()} - before)
        if fault is None and result.exit_code and left:
            fault = f"left {', '.join(left)}"
        if fault is None and any(name.endswith((".partial", ".old")) for name in left):
            fault = f"left {', '.join(left)}"
        if fault is None and time.monotonic() - began > SECONDS:
            fault = f"took {time.monotonic() - began:.0f} s"
        return None if fault is None else Fall(number, words, damage, fault)


def damage_file(path: Path, draw: random.Random) -> str:
    """Damage the file at ``path``, which may be a link of another; returns the damage in words."""
    kind, raw = draw.random(), path.read_bytes()
    path.unlink()
    if kind < 0.1:
        name = draw.choice(list(SPECIALS))
        SPECIALS[name](path)
        return name
    if kind < 0.2:
        number = draw.randrange(len(WHOLE))
        path.write_bytes(WHOLE[number])
        return f"{WHOLE[number][:20]!r} in its place"
    if path.suffix == ".safetensors":
        if kind < 0.4:
            path.write_bytes(raw)
            dtype = draw.choice(_DTYPES)
            other_dtype(path, dtype)
            return str(dtype)
        path.write_bytes(change_header(raw, draw))
        return "header"
    if path.suffix in (".json", ".jsonl") and path.name != "text.jsonl":
        path.write_bytes(change_json(raw, draw))
        return "tree"
    if path.suffix in (".yml", ".yaml"):
        path.write_bytes(change_yaml(raw, draw))
        return "YAML"
    path.write_bytes(change_bytes(raw, draw))
    return "bytes"


def _invoke(words: tuple[str, ...]) -> Result:
    from qplug.cli.main import main

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CliRunner().invoke(main, list(words), prog_name="qplug")


def _fault(result: Result) -> str | None:
    """What is wrong with how a command ended, if anything."""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        where = traceback.extract_tb(result.exception.__traceback__)[-1]
        text = " ".join(str(result.exception).split())[:150]
        place = f"{Path(where.filename).name}:{where.lineno}"
        return f"{type(result.exception).__name__} in {place}: {text}"
    if result.exit_code not in (0, 1, 2):
        return f"exit code {result.exit_code}"
    lines = [line for line in result.stderr.splitlines() if not line.startswith("Warning: ")]
    if result.exit_code == 1 and "\x1b" in result.stderr:
        return f"control characters: {result.stderr!r}"[:200]
    errors = [line for line in lines if line.startswith("Error: ")]
    if len(errors) > 1 or (errors and lines[-1] != errors[0]):
        return f"more than a line: {result.stderr!r}"[:300]
    if result.exit_code and not lines and not result.stdout:
        return "said nothing"
    if any(len(line) > 3000 for line in lines):
        return "a line of more than 3000 characters"
    return None


@contextmanager
def _bounds() -> Iterator[None]:
    """A context that ends after ``SECONDS``, and has ``BYTES`` more of memory."""

    def end(number: int, frame: FrameType | None) -> None:
        raise TooLong

    old = signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + BYTES + (1 << 30), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    falls, kinds = [], Counter[str]()
    with tempfile.TemporaryDirectory() as root:
        fuzzer, began = Fuzzer(Path(root), asked.seed), time.monotonic()
        for number in range(asked.first, asked.first + asked.count):
            started = time.monotonic()
            fall = fuzzer.fall(number)
            if fall is not None:
                falls.append(fall)
                kinds[fall.fault.partition(":")[0]] += 1
                print(str(fall).replace(root, ""), flush=True)
            if asked.verbose and time.monotonic() - started > 2:
                print(f"case {number}: {time.monotonic() - started:.1f} s", flush=True)
        seconds = time.monotonic() - began
    print(f"{asked.count} cases, {len(falls)} fell, {seconds:.0f} s")
    for kind, count in kinds.most_common():
        print(f"{count:5} {kind}")


if __name__ == "__main__":
    main()
