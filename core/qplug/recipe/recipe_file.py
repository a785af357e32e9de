"""The native recipe: a job as a YAML file, read and written."""

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
    """The job that a native recipe asks for. Raises QplugError, with the line.

    A key that stands where an older version had it is read, and warned of.
    """
    root = _observer_moved(root, warnings)
    return replace(read(Job, root), places=_places(root.entries()))


def _observer_moved(root: Node, warnings: list[str]) -> Node:
    """``root`` with ``observer`` in ``calibration``; it was a key of its own."""
    top = dict(root.entries())
    observer = top.pop("observer", None)
    if observer is None:
        return root
    warnings.append(f"{observer.place}: say it in calibration: {{observer: {observer.plain()}}}")
    inner = top["calibration"].entries() if "calibration" in top else {}
    place = top["calibration"].place if "calibration" in top else observer.place
    top["calibration"] = Node(place, {"observer": observer, **inner})
    return Node(root.place, top)


def _places(top: Mapping[str, Node]) -> dict[str, str]:
    """Where each part stands that plugins have a say in."""
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
    """The native recipe of ``job``, as YAML; keys that have their default are left out."""
    # The pipeline and the scheme decide most: they are said even if they are the default.
    entries = {"pipeline": ["rtn"], "scheme": "W4A16", **plain(job)}
    order = [name for name in schema()["properties"] if name in entries]
    return yaml.safe_dump(
        {name: entries[name] for name in order}, sort_keys=False, allow_unicode=True
    )
