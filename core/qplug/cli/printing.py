"""Prints results on stdout and everything else on stderr, in characters that a terminal only shows.

Commands of qplug print by these functions alone. While a command runs, stdout has nothing else on
it: what plugins and libraries print goes to stderr, so that a program can read the results.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any, TextIO, cast

import click

from qplug.errors import shown
from qplug.registry.registry import Registry

_KEY = "qplug.results"


#: The settings of all commands: ``-h`` is ``--help``.
SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"]}


class Command(click.Command):
    """A command of qplug: stdout is for its results, and no plugin ends the process."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # click keeps the help option of the first context, which need not be that of a group.
        self.context_settings = {**SETTINGS, **self.context_settings}

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        with _results(ctx), _registry(ctx).blaming():
            return super().invoke(ctx)


def _registry(ctx: click.Context) -> Registry:
    registry = ctx.find_object(Registry)
    assert registry is not None
    return registry


def say(line: object) -> None:
    """Prints one line of results on stdout. A line break in ``line`` is shown as ``\\n``."""
    click.echo(shown(line), file=_stream())


@dataclass(frozen=True)
class Piece:
    """A part of a line: ``look`` is a colour, ``bold``, ``dim``, or empty."""

    text: str
    look: str = ""


def say_pieces(pieces: Iterable[Piece]) -> None:
    """Prints one line of results that is made of ``pieces``, in colours where a terminal has them.

    There are no colours in a file or a pipe, nor if NO_COLOR is set.
    """
    styled = "".join(_styled(piece) for piece in pieces)
    plain = bool(os.environ.get("NO_COLOR"))
    click.echo(styled.rstrip(), file=_stream(), color=False if plain else None)


def _styled(piece: Piece) -> str:
    text = shown(piece.text)
    if not piece.look or not text.strip():
        return text
    if piece.look in ("bold", "dim"):
        return click.style(text, bold=piece.look == "bold" or None, dim=piece.look == "dim" or None)
    return click.style(text, fg=piece.look)


def say_text(text: str) -> None:
    """Prints the lines of ``text``, which the caller has made of several."""
    for line in text.split("\n"):
        say(line)


def say_json(value: object) -> None:
    """Prints ``value`` as JSON on stdout; NaN and infinities, which JSON has not, as null."""
    # JSON escapes all that is not ASCII, control characters of terminals among them.
    click.echo(json.dumps(_finite(value), indent=2, default=str), file=_stream())


def note(line: object, *, file: TextIO | None = None) -> None:
    """Prints one line for people on stderr, or to ``file``."""
    click.echo(shown(line), file=file, err=True)


def warn(sentence: object) -> None:
    """Prints a warning on a line of stderr."""
    note(f"Warning: {sentence}")


def give_back_stdout() -> None:
    """Ends the separation of results for a program that takes the place of this process."""
    stream = _stream()
    stream.flush()
    with suppress(OSError, ValueError):  # a stream in memory has no descriptor
        os.dup2(stream.fileno(), 1)


def _stream() -> TextIO:
    ctx = click.get_current_context(silent=True)
    return cast("TextIO", ctx.meta.get(_KEY, sys.stdout) if ctx else sys.stdout)


@contextmanager
def _results(ctx: click.Context) -> Iterator[None]:
    """Within the context only ``say`` and ``say_json`` reach stdout."""
    stdout = sys.stdout
    if not _is_descriptor_1(stdout):
        ctx.meta[_KEY] = stdout or io.StringIO()  # a closed stdout takes nothing
        with redirect_stdout(sys.stderr):
            yield
        return
    stdout.flush()
    saved = os.dup(1)
    # The descriptor too: libraries in C do not print by sys.stdout.
    _replace_descriptor_1()
    results = os.fdopen(saved, "w", encoding=stdout.encoding, errors="backslashreplace")
    ctx.meta[_KEY] = results
    try:
        with redirect_stdout(sys.stderr):
            yield
        results.flush()
    finally:
        ctx.meta[_KEY] = stdout
        _flush_libraries()
        os.dup2(saved, 1)
        results.close()


def _replace_descriptor_1() -> None:
    try:
        os.dup2(2, 1)
    except OSError:  # there is no stderr
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)


def _flush_libraries() -> None:
    """Writes what libraries in C have printed and not yet written."""
    import ctypes

    with suppress(OSError, TypeError, AttributeError):  # not every system has such a library
        ctypes.CDLL(None).fflush(None)


def _is_descriptor_1(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.fileno() == 1
    except (io.UnsupportedOperation, OSError, ValueError):
        return False


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(own) for own in value]
    return value
