"""English prose and Python code from the interpreter itself: the language reference and modules.

Both come with every full installation, so that the first command works with no network and no
file. A few hundred thousand tokens of technical text: enough to try things out and to test with,
no match for a broad corpus such as pileval.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from qplug import Dataset, NoParams, QplugError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qplug import Split

#: Modules of one file: every Python since 3.10 has them.
_MODULES = (
    *("argparse", "base64", "calendar", "cmd", "configparser", "contextlib", "csv", "dataclasses"),
    *("difflib", "fileinput", "fractions", "functools", "gettext", "heapq", "mimetypes", "pprint"),
    *("queue", "random", "shlex", "socketserver", "statistics", "tempfile", "textwrap", "timeit"),
    *("tokenize", "wave", "weakref"),
)

#: One document in so many is kept for evaluation.
_HELD_OUT = 8


class Demo(Dataset[NoParams]):
    """Ships with qplug: prose and code that every Python carries (about 1 MB).

    The text is the same wherever the version of Python is the same, patch release included.
    """

    name = "demo"

    def documents(self, split: Split) -> Iterator[str]:
        evaluation = split == "evaluation"
        for number, (_, text) in enumerate(sorted([*_prose(), *_code()])):
            if (number % _HELD_OUT == _HELD_OUT - 1) == evaluation:
                yield text


def _prose() -> Iterator[tuple[str, str]]:
    """The language reference by topic. What several topics say is left in the first only.

    Topics quote one another at length, and what is evaluated on must not be calibrated on.
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
        if len(paragraphs) > 1:  # more than a heading is left
            yield f"{name} (reference)", "\n\n".join(paragraphs).strip("\n")


def _code() -> Iterator[tuple[str, str]]:
    # Read from the library's folder, not through the import system: a user's own random.py in the
    # working directory must not become calibration text.
    library = Path(sysconfig.get_path("stdlib"))
    files = [library / f"{name}.py" for name in _MODULES]
    # A later Python may have dropped one.
    there = [file for file in files if file.is_file()]
    if not there:
        raise _no_text("the source of its library")
    for file in there:
        yield f"{file.stem} (module)", file.read_text("utf-8")


def _no_text(what: str) -> QplugError:
    return QplugError(
        f"dataset demo: this Python comes without {what}: install the full standard library, or "
        "use text of your own: --dataset text --dataset-opt path=FILE"
    )
