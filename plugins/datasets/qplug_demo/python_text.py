"""Reads English prose and Python code from Python itself: the language reference and modules.

Every full installation of Python has both, so that the first command needs no network and no
file. They are a few hundred thousand tokens of technical text, which is enough for trials and
tests, but no substitute for a broad corpus such as pileval.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from qplug import Dataset, NoParams, QplugError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qplug import Split

#: Modules that are a single file and that every Python since 3.10 has.
_MODULES = (
    *("argparse", "base64", "calendar", "cmd", "configparser", "contextlib", "csv", "dataclasses"),
    *("difflib", "fileinput", "fractions", "functools", "gettext", "heapq", "mimetypes", "pprint"),
    *("queue", "random", "shlex", "socketserver", "statistics", "tempfile", "textwrap", "timeit"),
    *("tokenize", "wave", "weakref"),
)

#: One document in this many is for evaluation, the others for calibration.
_EVALUATION_SHARE = 8


class Demo(Dataset[NoParams]):
    """Prose and code that come with every Python (about 1 MB, nothing to download).

    The text depends on the version of Python, patch release included, and on nothing else.
    """

    name = "demo"

    def documents(self, split: Split) -> Iterator[str]:
        evaluation = split == "evaluation"
        for number, (_, text) in enumerate(sorted([*_prose(), *_code()])):
            if (number % _EVALUATION_SHARE == _EVALUATION_SHARE - 1) == evaluation:
                yield text


def _prose() -> Iterator[tuple[str, str]]:
    """Yields the topics of the language reference with their titles.

    A paragraph that several topics share is kept in the first topic only: topics quote one another
    at length, and evaluation text must not be calibrated on.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise _no_text("pydoc_data") from error
    seen: set[str] = set()
    for name in sorted(topics):
        paragraphs = []
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                paragraphs.append(paragraph)
                seen.add(words)
        if len(paragraphs) > 1:  # a single paragraph is a heading alone
            yield f"{name} (reference)", "\n\n".join(paragraphs).strip("\n")


def _code() -> Iterator[tuple[str, str]]:
    """Yields the source of modules of the standard library with their titles."""
    # Reads the library's folder instead of importing: a user's own random.py in the working
    # directory must not become calibration text.
    library = Path(sysconfig.get_path("stdlib"))
    files = [library / f"{name}.py" for name in _MODULES]
    # A later Python may have removed some modules.
    existing = [file for file in files if file.is_file()]
    if not existing:
        raise _no_text("the source of its library")
    for file in existing:
        yield f"{file.stem} (module)", file.read_text("utf-8")


def _no_text(what: str) -> QplugError:
    return QplugError(
        f"dataset demo: this Python comes without {what}: install the full standard library, or "
        "use your own text: --dataset text --dataset-opt path=FILE"
    )
