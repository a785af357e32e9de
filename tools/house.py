"""Measure how core's modules hang together, and the trips of two values through them.

    python tools/house.py

A module's floor is one above the highest floor that it imports; modules that import one another
share a floor. A trip is traced while the program runs: the files of core whose functions are called
with the value, and the climbs, which are calls into a higher floor than the call before.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from importlib import import_module
from itertools import groupby, pairwise
from pathlib import Path
from runpy import run_module
from types import FrameType
from typing import Any

import grimp
import networkx as nx

CORE = Path(str(import_module("qplug").__file__)).parent
RECIPE = "model: qplug:demo\npipeline: [rtn]\nexport:\n- out: {out}\n  backend: vllm\n"
#: The types that carry a recipe, or a part of it, and those that carry an opened folder.
RECIPES = {"Job", "Recipe", "RecipeFile", "ReadJob", "Given", "Calibration", "Export", "Scheme"}
FOLDERS = {"Folder", "Checkpoint", "Manifest"}


def import_graph() -> nx.DiGraph:
    """Core's modules and their imports. Imports for annotations alone do not count."""
    found = grimp.build_graph("qplug", exclude_type_checking_imports=True)
    imports = nx.DiGraph()
    imports.add_nodes_from(found.modules)
    for module in found.modules:
        for imported in found.find_modules_directly_imported_by(module):
            imports.add_edge(module, imported)
    imports.remove_node("qplug")  # the face of all: it imports what every plugin needs
    return imports


def place(module: str) -> str:
    """The folder or file directly under core/qplug that a module is in."""
    return ".".join(module.split(".")[:2])


def floors(imports: nx.DiGraph) -> dict[str, int]:
    """The floor of each module, counted from 1."""
    rings = nx.condensation(imports)
    height: dict[int, int] = {}
    for ring in reversed(list(nx.topological_sort(rings))):
        height[ring] = 1 + max((height[below] for below in rings.successors(ring)), default=0)
    return {m: height[ring] for ring, data in rings.nodes(data=True) for m in data["members"]}


def route(words: list[str], start: str, end: str, carries: Callable[[Any], bool]) -> list[str]:
    """The modules of core that ``qplug WORDS`` enters with an argument that ``carries``, in order.

    They are noted while the function called ``start`` runs, until the module ``end`` is entered.
    """
    entered: list[str] = []
    running: list[FrameType] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        code, path = frame.f_code, Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(CORE):
            if code.co_name == start:
                running.append(frame)
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            arrived = bool(entered) and entered[-1].endswith(end)
            if running and not arrived and any(carries(frame.f_locals.get(name)) for name in names):
                entered.append(".".join(path.relative_to(CORE.parent).with_suffix("").parts))
        elif event == "return" and running and frame is running[-1]:
            running.pop()

    sys.argv = ["qplug", *words]
    sys.setprofile(note)
    try:
        with suppress(SystemExit), redirect_stdout(None):
            run_module("qplug", run_name="__main__")
    finally:
        sys.setprofile(None)
    return [module for module, _ in groupby(entered)]


def is_path(value: Any, path: Path) -> bool:
    return isinstance(value, (str, Path)) and str(value) == str(path)


def tell(trip: str, modules: list[str], height: dict[str, int]) -> None:
    """Print a trip."""
    climbs = sum(height.get(b, 0) > height.get(a, 0) for a, b in pairwise(modules))
    print(f"{trip}: {len(set(modules))} files, {len(modules)} stays, {climbs} climbs")
    print("  " + " > ".join(f"{height.get(m, 0)} {m.removeprefix('qplug.')}" for m in modules))


def main() -> None:
    imports = import_graph()
    height = floors(imports)
    rings = [ring for ring in nx.strongly_connected_components(imports) if len(ring) > 1]
    top = sorted(path.stem for path in CORE.glob("*.py"))
    places = floors(nx.quotient_graph(imports, lambda a, b: place(a) == place(b), relabel=True))
    print(f"{len(height)} modules, {len(top)} of them at the top of core/qplug: {', '.join(top)}")
    for what, floor in (("modules", height), ("places under core/qplug", places)):
        print(f"{what}: {max(floor.values())} floors, {sum(floor.values())} in sum")
    print(f"circles of modules: {len(rings)}")
    with tempfile.TemporaryDirectory() as scratch:
        file, out = Path(scratch) / "recipe.yaml", Path(scratch) / "out"
        file.write_text(RECIPE.format(out=out), encoding="utf-8")
        modules = route(
            ["quantize", "--config", str(file)],
            "main",
            ".stages",
            lambda value: is_path(value, file) or type(value).__name__ in RECIPES,
        )
        tell("a recipe, from --config to the stages that make the exporter", modules, height)
        modules = route(
            ["inspect", str(out)],
            "open_folder",
            ".none",
            lambda value: is_path(value, out) or type(value).__name__ in FOLDERS,
        )
        tell("a folder, in open_folder", modules, height)


main()
