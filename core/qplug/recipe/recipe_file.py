"""Reads and writes native recipes: jobs as YAML files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import yaml

from qplug.recipe.fields import json_schema, plain, read
from qplug.recipe.recipe import Job
from qplug.recipe.yaml_tree import Node


def schema() -> dict[str, Any]:
    """The JSON Schema of a native recipe."""
    return json_schema(Job, "qplug recipe")


def read_recipe(root: Node, warnings: list[str]) -> Job:
    """Read the job in a native recipe. Raises QplugError, with file and line, for a mistake.

    A key in the place of an older version is read too; a warning about it goes into ``warnings``.
    """
    root = _observer_moved(root, warnings)
    return replace(read(Job, root), places=_places(root.entries()))


def _observer_moved(root: Node, warnings: list[str]) -> Node:
    """``root`` with ``observer`` moved into ``calibration``; older files have it at the top."""
    top = dict(root.entries())
    observer = top.pop("observer", None)
    if observer is None:
        return root
    warnings.append(f"{observer.place}: move it: calibration: {{observer: {observer.plain()}}}")
    inner = top["calibration"].entries() if "calibration" in top else {}
    place = top["calibration"].place if "calibration" in top else observer.place
    top["calibration"] = Node(place, {"observer": observer, **inner})
    return Node(root.place, top)


def _places(top: Mapping[str, Node]) -> dict[str, str]:
    """The place of each part of a file that plugins check, by the names of ``Job.places``."""
    places = {"algorithms": str(top["pipeline"].place)} if "pipeline" in top else {}
    for step in top["pipeline"].items() if "pipeline" in top else ():
        name = step.value["algorithm"].value if isinstance(step.value, dict) else step.value
        places[f"algorithms.{name}"] = str(step.place)
    if "calibration" in top:
        places["calibration"] = str(top["calibration"].place)
    for key, part in (("export", "exports"), ("eval", "measurements")):
        for number, node in enumerate(top[key].items() if key in top else ()):
            places[f"{part}.{number}"] = str(node.place)
    return places


def write_recipe(job: Job) -> str:
    """Write ``job`` as a native recipe in YAML; keys with their default value are left out."""
    # The pipeline and the scheme decide most, so the file names them even if they are the default.
    entries = {"pipeline": ["rtn"], "scheme": "W4A16", **plain(job)}
    order = [name for name in schema()["properties"] if name in entries]
    ordered = {name: entries[name] for name in order}
    text = yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True)
    if text.replace("\n", "").isprintable():
        return text
    return yaml.safe_dump(ordered, sort_keys=False)  # what a terminal would obey is escaped
