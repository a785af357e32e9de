"""The border to code that takes strange data apart: what it stumbles over is the data's fault."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from qplug.errors import QplugError

#: What code raises for a value of a wrong type, a wrong shape, or out of range.
_STUMBLES = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError),
    *(ValueError, re.error),
)


@contextmanager
def naming_damage(where: str, reader: str) -> Iterator[None]:
    """A context in which ``reader``, a backend, takes apart what is at ``where``.

    An exception that code raises for wrong values becomes a QplugError that names both.
    """
    try:
        yield
    except _STUMBLES as error:
        if type(error).__name__ == "OutOfMemoryError" or "memory" in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise QplugError(
            f"{where}: {reader} cannot read it: {type(error).__name__}: {reason}"
        ) from error
