"""Chooses the version of an engine by whose rules a folder is checked and served."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qplug.api import Engine
from qplug.api.capability import NEWEST
from qplug.machine.engines import find_engine
from qplug.output.manifest import Manifest


@dataclass(frozen=True)
class EngineVersion:
    """The version of an engine, and why it was chosen.

    ``version`` is what ``Engine.at`` takes. ``releases``: those whose rules hold, one for each
    engine that loads the folder (``SGLang 0.5.23``). ``why`` is a clause: ``0.5.24 is installed``.
    """

    version: str
    releases: tuple[str, ...]
    why: str

    def __str__(self) -> str:
        return f"rules of {' and '.join(self.releases)}: {self.why}"


def choose_version(
    engine: Engine,
    backend: str,
    manifest: Manifest | None = None,
    *,
    asked: str | None = None,
    python: str | None = None,
) -> EngineVersion:
    """Returns the version of ``engine`` whose rules hold for a folder.

    It is ``asked``, else the version that is installed, else the version for which the run of
    ``manifest`` wrote the folder for ``backend``, else the newest with a table. An installed
    version without a table has the rules of the nearest older one. ``python``: the interpreter that
    has the engine, by default as in ``find_engine``. Raises QplugError if ``asked`` has no table.
    """
    if asked is not None:
        return _chosen(engine, asked, "asked for")
    if engine.server is not None and engine.releases:
        found = find_engine(engine.server, python).version
        if found is not None:
            nearest = nearest_version([*engine.releases], found)
            return _chosen(engine, nearest, f"{found} is installed")
    recorded = _recorded(manifest) if manifest is not None and manifest.backend == backend else None
    if recorded is not None and recorded != NEWEST:
        return _chosen(engine, recorded, "the folder was written for it")
    return _chosen(engine, NEWEST, "the newest that qplug knows")


def _chosen(engine: Engine, version: str, why: str) -> EngineVersion:
    held = engine.at(version).held
    return EngineVersion(version, tuple(names[0] for names in held.values()), why)


def _recorded(manifest: Manifest) -> str | None:
    """The version in the recipe of ``manifest``; None if the recipe names none."""
    options = manifest.recipe.get("backend_options")
    version = options.get("engine") if isinstance(options, dict) else None
    return version if isinstance(version, str) else None


def nearest_version(releases: Sequence[str], installed: str) -> str:
    """The newest of ``releases`` that is not newer than ``installed``, else the oldest.

    ``releases`` are of one engine (``vLLM 0.32.0``), the newest first; the result is a number.
    """
    versions = [release.rpartition(" ")[2] for release in releases]
    older = (each for each in versions if _numbers(each) <= _numbers(installed))
    return next(older, versions[-1])


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers that ``version`` begins with: ``0.32.1+cpu`` has 0, 32 and 1."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[^\d.]", version)[0]))
