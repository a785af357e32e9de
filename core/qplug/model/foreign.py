"""Exceptions that begin in transformers: nearly always, a file of the model has a wrong value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from qplug.errors import QplugError

_THEIRS = ("transformers", "transformers_modules", "tokenizers", "huggingface_hub")
#: Packages that are called by both qplug and transformers, so that their own frames say nothing.
_SHARED = ("torch", "einops", "numpy")


@contextmanager
def naming_file(path: Path, what: str) -> Iterator[None]:
    """A context in which an exception that begins in transformers becomes a QplugError.

    The error names ``path``, the file that decides what transformers does, and says ``what`` is
    wrong. An exception that begins in qplug or in a plugin is a bug, and passes unchanged.
    """
    try:
        yield
    except QplugError:
        raise
    except Exception as error:  # transformers raises anything for a wrong value
        if not _begins_there(error.__traceback__):
            raise
        raise QplugError(f"{path}: {what}: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """The message of ``error`` on one line, of a limited length; its type if it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _begins_there(trace: TracebackType | None) -> bool:
    """Whether the innermost frame of ``trace`` that is of no shared package is transformers'."""
    packages = []
    while trace is not None:
        packages.append(str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0])
        trace = trace.tb_next
    own = [package for package in packages if package not in _SHARED]
    return bool(own) and own[-1] in _THEIRS
