"""Plugins with every fault that a stranger's plugin may have: who is named, and what still works.

Each plugin is a package of its own, ``bad-NAME 1.0``, next to the plugins of qplug.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent, indent
from types import SimpleNamespace
from typing import TYPE_CHECKING, Protocol

import pytest
from click.testing import CliRunner, Result

from qplug import PluginError, quantize
from qplug.cli.main import main

if TYPE_CHECKING:
    from conftest import Starter

HOOK = "from qplug import hookimpl\n@hookimpl\ndef qplug_algorithms():\n    "
#: Plugins that break before they offer anything, and what ``qplug plugins check`` says of each.
BROKEN = {
    "exits": ("import sys; sys.exit(0)", "SystemExit: 0"),
    "interrupts": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "raises": ("1 / 0", "ZeroDivisionError: division by zero"),
    "syntax": ("def", "SyntaxError: "),
    "lacks": ("import not_there_at_all", "ModuleNotFoundError: No module named"),
    "odd": ("class Odd(BaseException): pass\nraise Odd('strange')", "Odd: strange"),
    "mute": (
        "class Mute(Exception):\n    def __str__(self): 1 / 0\nraise Mute",
        "Mute: an exception without a readable message",
    ),
    "escapes": (
        r"raise ValueError('\x1b]0;pwn\x07\nsecond line \u202e')",
        r"ValueError: \x1b]0;pwn\x07 second line \u202e",
    ),
    "no-hook": ("def qplug_algorithms(): return []", "TypeError: "),
    "unknown-hook": (HOOK.replace("algorithms", "algoritms") + "return []", "unknown hook"),
    "hook-exits": (HOOK + "raise SystemExit(0)", "SystemExit: 0"),
    "hook-interrupts": (HOOK + "raise KeyboardInterrupt", "KeyboardInterrupt"),
    "hook-raises": (HOOK + "1 / 0", "ZeroDivisionError: division by zero"),
    "hook-none": (HOOK + "return None", "must return a list, not None"),
    "hook-junk": (HOOK + "return [1]", "TypeError: 1 is not a subclass of qplug.Algorithm"),
    "hook-ends": (
        HOOK + "import click; raise click.exceptions.Exit(0)",
        "Exit: 0",
    ),
}

ALGORITHM = """
from dataclasses import replace
import os, sys
from qplug import Algorithm, hookimpl
from qplug.numerics import nearest

class Bad(Algorithm):
    "Text."
    name = "{name}"

    def quantize(self, block):
        return {{linear.name: nearest(linear) for linear in block.linears}}

{method}

@hookimpl
def qplug_algorithms():
    return [Bad]
"""
QUANTIZE = "def quantize(self, block):\n    "
ENDS = {
    "exit": "sys.exit(0)",
    "exit-text": "sys.exit('done')",
    "interrupt": "raise KeyboardInterrupt",
    "leave": "import click; raise click.exceptions.Exit(0)",
    "abort": "import click; raise click.Abort",
    "cancel": "import asyncio; raise asyncio.CancelledError",
}
#: Algorithms that end the process, by name: the method that does.
ENDING = {
    **{f"alg-{how}": QUANTIZE + body for how, body in ENDS.items()},
    "init-exit": "def __init__(self, params): sys.exit(0)",
    "refuses-exit": "def refuses(self, schemes): sys.exit(0)",
    "decides-exit": "decides = property(lambda self: sys.exit(0))",
    "transform-exit": "def transform(self, block): sys.exit(0)",
    "prepare-exit": "def prepare(self, model): sys.exit(0)",
}
#: Algorithms that return garbage, by name.
GARBAGE = {
    "alg-none": QUANTIZE + "return None",
    "alg-number": QUANTIZE + "return 7",
    "alg-empty": QUANTIZE + "return {}",
    "alg-strings": QUANTIZE + "return {linear.name: 'codes' for linear in block.linears}",
    "alg-raises": QUANTIZE + "1 / 0",
    "alg-floats": QUANTIZE + "return {l.name: l.weight for l in block.linears}",
    "alg-args": QUANTIZE + "return {l.name: replace(nearest(l), args=None) for l in block.linears}",
    "alg-nan": QUANTIZE
    + "return {l.name: replace(nearest(l), scale=nearest(l).scale * float('nan'))"
    " for l in block.linears}",
    "transform-raises": "def transform(self, block): 1 / 0",
}
DATASET = """
from qplug import Dataset, hookimpl
import sys

class Bad(Dataset):
    "Text."
    name = "{name}"

    def documents(self, split):
        {body}

@hookimpl
def qplug_datasets():
    return [Bad]
"""
DATASETS = {
    "data-exit": "sys.exit(0)",
    "data-late-exit": "yield 'text'; sys.exit(0)",
    "data-none": "return None",
    "data-numbers": "return iter([1, 2])",
    "data-raises": "1 / 0",
}
EXPORTER = """
import sys
from qplug import Exporter, hookimpl

def define():
    from qplug_compressed_tensors import qplug_exporters
    (kind,) = qplug_exporters()

    class Odd(type(kind.format)):
        {method}

    class Bad(kind):
        "Text."
        name = "{name}"
        format = Odd()

    return Bad

@hookimpl
def qplug_exporters():
    return [define()]
"""
EXPORTERS = {
    "pack-exit": "def pack(self, weight, scheme, dtype): sys.exit(0)",
    "pack-none": "def pack(self, weight, scheme, dtype): return None",
    "layout-exit": "def layout(self, shape, scheme, dtype): sys.exit(0)",
    "layout-none": "def layout(self, shape, scheme, dtype): return None",
    "config-none": "def config(self, model, schemes): sys.exit(0)",
}
HOOKS = {
    "view-exit": "@hookimpl\ndef qplug_model_view(config): raise SystemExit(0)",
    "view-odd": "@hookimpl\ndef qplug_model_view(config): return {}",
}


class Install(Protocol):
    def __call__(self, name: str, code: str) -> None: ...


class Qplug(Protocol):
    def __call__(self, *words: object) -> Result: ...


def package(folder: Path, name: str, code: str) -> None:
    """Writes the package ``bad-NAME 1.0`` into ``folder``, which is on Python's path."""
    module = f"bad_{name}".replace("-", "_")
    (folder / f"{module}.py").write_text(dedent(code))
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: bad-{name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[qplug]\n{name} = {module}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages that is on Python's path."""
    before = set(sys.modules)
    monkeypatch.delenv("QPLUG_PLUGINS", raising=False)
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in set(sys.modules) - before:
        if name.startswith("bad_"):
            del sys.modules[name]


@pytest.fixture
def install(site: Path) -> Install:
    return lambda name, code: package(site, name, code)


@pytest.fixture
def qplug() -> Qplug:
    def run(*words: object) -> Result:
        return CliRunner().invoke(main, [str(word) for word in words], prog_name="qplug")

    return run


def algorithm(name: str, method: str) -> str:
    return ALGORITHM.format(name=name, method=indent(method, "    "))


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"site", "llama"}


def one_line(result: Result, *words: str) -> None:
    """Asserts that a command failed with one line that has all ``words``."""
    assert result.exit_code == 1, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit), result.exception
    before = re.compile(r"opening |\S+ \(\w+, .* parameters, ")  # what it opens, and the plan
    lines = [line for line in result.stderr.splitlines() if not before.match(line)]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    assert all(word in result.stderr for word in words), (result.stderr, words)
    assert result.stdout == ""


# --- before anything is offered -------------------------------------------------------------------


@pytest.mark.parametrize("name", BROKEN)
def test_a_plugin_that_breaks_is_named_and_stops_no_other(
    name: str, install: Install, qplug: Qplug
) -> None:
    code, says = BROKEN[name]
    install(name, code)
    checked = qplug("plugins", "check")
    assert checked.exit_code == 1
    (line,) = (line for line in checked.stdout.splitlines() if line.startswith("failed"))
    assert line.split()[1:4] == [name, f"bad-{name}", "1.0"]
    assert says in line
    assert any(line.split()[:2] == ["ok", "rtn"] for line in checked.stdout.splitlines())
    one_line(qplug("quantize", "m", "--algo", name, "--out", "o"), f"bad-{name} 1.0")


def test_all_of_them_at_once(install: Install, qplug: Qplug, llama: Path, tmp_path: Path) -> None:
    for name, (code, _) in BROKEN.items():
        install(name, code)
    for name, method in {**ENDING, **GARBAGE}.items():
        install(name, algorithm(name, method))
    install("clash", algorithm("rtn", ""))
    install("loud", "print('loud')\n" + HOOK + "print('louder'); return []")
    lines = qplug("plugins", "check").stdout.splitlines()
    failed = [line.split()[1] for line in lines if line.startswith("failed")]
    assert failed == sorted(BROKEN)
    assert [line for line in lines if line.startswith("clash")] == [
        "clash  algorithm 'rtn' comes from clash (bad-clash 1.0) and rtn (qplug 0.1.0);"
        " drop it: -p no:clash"
    ]
    out = tmp_path / "out"
    result = qplug("quantize", llama, "--algo", "hqq", "--group-size", "32", "--out", out, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["out"] == str(out)
    assert "louder\n" in result.stderr
    refused = qplug("quantize", llama, "--algo", "rtn", "--out", out)
    assert refused.exit_code == 1
    assert "drop it: -p no:clash" in refused.stderr.splitlines()[-1]


@pytest.mark.parametrize("entries", ["[qplug]\nno sign of equality\n", "[qplug]\nx\udcff = y\n"])
def test_a_package_with_broken_metadata_hides_no_other(
    entries: str, site: Path, qplug: Qplug
) -> None:
    info = site / "bad_meta-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad-meta\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entries, errors="surrogateescape")
    listed = qplug("plugins", "list")
    assert listed.exit_code == 0, listed.output
    assert "\nalgorithm  rtn " in listed.stdout
    (line,) = (line for line in listed.stdout.splitlines() if "bad-meta" in line)
    assert "Error" in line


def test_a_slow_import_is_named(
    install: Install, qplug: Qplug, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A clock that goes on while this module is imported, and stands still otherwise.
    clock = SimpleNamespace(monotonic=lambda: 1.3 if "bad_slow" in sys.modules else 0.0)
    monkeypatch.setattr("qplug.registry.registry.time", clock)
    install("slow", algorithm("slow", ""))
    result = qplug("plugins", "check")
    (line,) = (line for line in result.stdout.splitlines() if " slow " in line)
    assert line.endswith("algorithm slow (its import took 1.3 s)")
    warning = "Warning: plugin slow (bad-slow 1.0): its import took 1.3 s; -p no:slow leaves it out"
    assert warning in result.stderr.splitlines()


# --- algorithms, datasets and exporters -----------------------------------------------------------


@pytest.mark.parametrize("name", ENDING)
def test_an_algorithm_does_not_end_the_process(
    name: str, install: Install, qplug: Qplug, llama: Path, tmp_path: Path
) -> None:
    install(name, algorithm(name, ENDING[name]))
    words = ("--samples", 1, "--seq-len", 16, "--group-size", 32, "--out", tmp_path / "out")
    one_line(qplug("quantize", llama, "--algo", name, *words), f"plugin {name} (bad-{name} 1.0): ")
    assert left_in(tmp_path) == set()


@pytest.mark.parametrize("name", sorted(set(ENDING) - {"alg-interrupt"}))
def test_nor_a_program_that_calls_qplug(
    name: str, install: Install, llama: Path, tmp_path: Path
) -> None:
    """Outside of the command line nobody knows whether the user pressed Ctrl-C."""
    install(name, algorithm(name, ENDING[name]))
    with pytest.raises(PluginError, match=f"bad-{name} 1.0"):
        quantize(str(llama), tmp_path / "out", algo=name, samples=1, seq_len=16, group_size=32)


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_blamed_on_the_algorithm(
    name: str, install: Install, qplug: Qplug, llama: Path, tmp_path: Path
) -> None:
    install(name, algorithm(name, GARBAGE[name]))
    result = qplug("quantize", llama, "--algo", name, "--group-size", 32, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert f"plugin {name} (bad-{name} 1.0)" in f"{result.stderr}{result.exception}"
    assert "no plugin" not in f"{result.stderr}{result.exception}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_is_named(
    name: str, install: Install, qplug: Qplug, llama: Path, tmp_path: Path
) -> None:
    install(name, DATASET.format(name=name, body=DATASETS[name]))
    words = ("--samples", 1, "--seq-len", 16, "--group-size", 32, "--out", tmp_path / "out")
    result = qplug("quantize", "qplug:demo", "--algo", "awq", "--dataset", name, *words)
    assert result.exit_code == 1
    assert f"plugin {name} (bad-{name} 1.0)" in f"{result.stderr}{result.exception}"
    assert left_in(tmp_path) == set()


@pytest.mark.parametrize("name", EXPORTERS)
def test_an_exporter_is_named(
    name: str, install: Install, qplug: Qplug, llama: Path, tmp_path: Path
) -> None:
    install(name, EXPORTER.format(name=name, method=EXPORTERS[name]))
    out = tmp_path / "out"
    result = qplug(
        "quantize", "--algo", "rtn", llama, "--group-size", 32, "--backend", name, "--out", out
    )
    assert result.exit_code == 1
    assert f"plugin {name} (bad-{name} 1.0)" in f"{result.stderr}{result.exception}"
    assert not out.exists()
    if "exit" in name:
        one_line(result, "SystemExit: 0")
        assert left_in(tmp_path) == set()


@pytest.mark.parametrize("name", HOOKS)
def test_a_plugin_with_views_is_named(
    name: str, install: Install, qplug: Qplug, llama: Path, tmp_path: Path
) -> None:
    install(name, "from qplug import hookimpl\n" + HOOKS[name])
    result = qplug(
        "quantize", "--algo", "rtn", llama, "--group-size", 32, "--out", tmp_path / "out"
    )
    one_line(result, f"plugin {name} (bad-{name} 1.0): ")
    assert left_in(tmp_path) == set()


# --- names that clash -----------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--algo", "hqq"], ["--algo", "quarot"], ["--algo", "awq"]])
def test_a_clash_refuses_nobody_who_does_not_use_the_name(
    words: list[str], install: Install, qplug: Qplug, tmp_path: Path
) -> None:
    install("clash", algorithm("rtn", QUANTIZE + "1 / 0"))
    words = [*words, "--samples", "1", "--seq-len", "16", "--dry-run", "--out", str(tmp_path / "o")]
    result = qplug("quantize", "--algo", "rtn", "qplug:demo", *words)
    assert result.exit_code == 0, result.output


def test_a_clash_of_backends_stops_no_reader(
    install: Install, qplug: Qplug, llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ("--group-size", 32, "--backend", "compressed-tensors", "--out", out)
    assert qplug("quantize", "--algo", "rtn", llama, *words).exit_code == 0
    (out / "qplug.json").unlink()
    install("clash", EXPORTER.format(name="sglang", method="pass"))
    assert "for compressed-tensors" in qplug("verify", out).stdout
    one_line(qplug("verify", out, "--backend", "sglang"), "drop it: -p no:clash")


# --- stdout ---------------------------------------------------------------------------------------

LOUD = """
import os
print("at import"); os.write(1, b"by descriptor\\n")
""" + ALGORITHM.replace(
    "def qplug_algorithms():",
    "def qplug_run_done(result):\n    print('done')\n\n@hookimpl\ndef qplug_algorithms():\n"
    "    print('in a hook')",
)
SPEAKS = """
def quantize(self, block):
    import ctypes
    print("in an algorithm", flush=True)
    ctypes.CDLL(None).puts(b"by a library in C")
    return {linear.name: nearest(linear) for linear in block.linears}
"""


def test_stdout_has_results_alone(start: Starter, llama: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "loud.py", tmp_path / "out"
    file.write_text(LOUD.format(name="loud", method=indent(SPEAKS, "    ")))
    words = ("--algo", "loud", "--group-size", 32, "--out", out, "--json")
    done = start("--plugin", file, "quantize", "--algo", "rtn", llama, *words).wait()
    assert done.codes == [0], done.stderr
    assert json.loads(done.stdout)["out"] == str(out)
    for said in ("at import", "by descriptor", "in a hook", "in an algorithm", "in C", "done"):
        assert said in done.stderr


def test_a_command_of_a_plugin_has_stdout_for_itself(start: Starter, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    code = "import os\nprint('at import')\nfrom qplug import hookimpl\n@hookimpl\n"
    code += "def qplug_commands(group):\n    @group.command()\n    def mine():\n"
    file.write_text(code + "        print('one', flush=True); os.write(1, b'two\\n'); exit(3)\n")
    done = start("--plugin", file, "mine").wait()
    assert (done.codes, done.stdout, done.stderr) == ([3], "one\ntwo\n", "at import\n")
