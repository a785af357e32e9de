"""Commands and Python on every page are run as they stand there, in order, in an empty folder.

What a page needs is on it: a block with a title is written to the file of that name. A block that
is not run says why, and its command lines must still be ones that qplug takes.
"""

from __future__ import annotations

import doctest
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest
import yaml
from click.testing import CliRunner

from qplug.cli.main import main

if TYPE_CHECKING:
    from conftest import Page

ROOT = Path(__file__).parents[2]
#: Pages that show what the check after a run prints.
CHECKED = ("README.md", "docs/tutorial.md")

_ALIKE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def commands(code: str) -> Iterator[tuple[list[str], str]]:
    """The command lines of a console block, as words, each with the output shown below it."""
    for part in re.split(r"^\$ ", code.replace("\\\n", " "), flags=re.MULTILINE)[1:]:
        line, _, output = part.partition("\n")
        yield shlex.split(line, comments=True), output


def words_for_qplug(words: list[str]) -> list[str] | None:
    """What a command line gives to qplug; None if it starts something else."""
    plain = [word for word in words if not re.fullmatch(r"[A-Z_]+=.*", word)]
    if plain[0] == "qplug":
        return plain[1:]
    if plain[0] == "torchrun":
        at = plain.index("qplug")
        assert plain[at - 1] == "-m"
        return plain[at + 1 :]
    return None


def test_blocks_run(typed_page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = typed_page
    if str(page.path.relative_to(ROOT)) in CHECKED:  # they show the quality of results
        monkeypatch.delenv("QPLUG_CHECK")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in _modules(page):
        monkeypatch.delitem(sys.modules, name, raising=False)  # of another page
    page.write_files(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for block in page.blocks:
        if block.reason:
            continue
        if block.language == "console":
            for words, wanted in commands(block.code):
                _run(words, wanted)
        elif block.language == "python":
            code = compile(block.code, str(page.path), "exec", dont_inherit=True)
            exec(code, {**names} if block.title else names)
        elif block.language == "yaml":
            assert yaml.safe_load(block.code)
        elif block.language == "json":
            assert json.loads(block.code)
        else:
            assert block.language in ("jsonl", "text", "toml"), block.language


def _modules(page: Page) -> list[str]:
    return [Path(block.title).stem for block in page.blocks if block.title]


def _run(words: list[str], wanted: str) -> None:
    given = words_for_qplug(words)
    assert given is not None, f"{words}: say why it is not run: <!-- not run: ... -->"
    result = CliRunner().invoke(main, given, prog_name="qplug")
    fails = wanted.startswith("Error: ")
    assert (result.exit_code != 0) == fails, f"{words}: {result.output}"
    if wanted:
        # What a command says of its progress before it fails is on no page.
        error = result.stderr[max(0, result.stderr.find("Error: ")) :]
        shown = error if fails else result.stdout
        alike = doctest.OutputChecker().check_output(wanted, shown, _ALIKE)
        assert alike, f"{words}\n--- the page says:\n{wanted}\n--- it prints:\n{shown}"


def test_command_lines_are_ones_that_qplug_takes(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page.write_files(tmp_path)
    for block in page.blocks:
        for words, _ in commands(block.code) if block.language == "console" else ():
            given = words_for_qplug(words)
            if given is not None:
                parse(main, "qplug", given)


def parse(command: click.Command, name: str, words: list[str]) -> None:
    """Raises click's UsageError for words that ``command`` does not take. Nothing is run."""
    context = command.make_context(name, words)
    if isinstance(command, click.Group):
        rest = [*context._protected_args, *context.args]
        inner, found, rest = command.resolve_command(context, rest)
        assert found is not None
        assert inner is not None
        parse(found, inner, rest)


#: Options of other programs, which pages name.
OF_OTHERS = {
    *("--again", "--only", "--run", "--jobs", "--engine"),  # of the zoo of tests
    *("--diff", "--record"),  # of tools/engine_anchors.py
    "--kv-cache-dtype",
    "--linear-backend",
    "--tp",
    "--strict",
    "--help",
    "--nproc-per-node",
    "--hypothesis-profile",
}


def test_options_in_the_text_exist(page: Page) -> None:
    """``--option`` in prose is one of qplug's, or of the program that the sentence is about."""
    known = OF_OTHERS | {option for command in _all(main) for option in _options(command)}
    prose = re.sub(r"^```.*?^```$", "", page.text, flags=re.MULTILINE | re.DOTALL)
    named = {name for code in re.findall(r"`[^`\n]+`", prose) for name in _FLAG.findall(code)}
    assert named <= known, named - known


_FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]+")


def _all(command: click.Command) -> Iterator[click.Command]:
    command = getattr(command, "load", lambda: command)()
    yield command
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            yield from _all(inner)


def _options(command: click.Command) -> Iterator[str]:
    for parameter in command.params:
        yield from (*parameter.opts, *parameter.secondary_opts)


def test_what_is_wrong_on_a_page_is_found() -> None:
    for line in ("quantize qplug:demo --outt x", "quantise", "plugins list more", "eval"):
        with pytest.raises(click.UsageError):
            parse(main, "qplug", line.split())
    with pytest.raises(AssertionError, match="the page says"):
        _run(["qplug", "--version"], "qplug 9\n")
    with pytest.raises(AssertionError, match="not run"):
        _run(["vllm", "serve"], "")
