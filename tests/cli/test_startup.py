"""Nothing that a user waits for needs torch or jinja2: ``--help``, lists, faces of plugins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import qplug

ROOT = Path(__file__).parents[2]
FACES = sorted((ROOT / "plugins").glob("*/qplug_*/__init__.py"))
HEAVY = ("torch", "transformers", "datasets", "safetensors", "numpy", "jinja2")


def imported_by(code: str, *roots: Path) -> set[str]:
    """The top-level modules that a fresh interpreter has after ``code``."""
    report = "\nimport sys; sys.stderr.write('\\n' + ' '.join(sys.modules))"
    plugins = sorted(path for path in (ROOT / "plugins").iterdir() if path.is_dir())
    paths = [*roots, Path(qplug.__file__).parents[1], *plugins]
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code + report],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
    )
    assert result.returncode == 0, result.stderr
    return {name.partition(".")[0] for name in result.stderr.splitlines()[-1].split()}


def run(*words: str) -> str:
    return (
        "import qplug.cli.main\n"
        f"assert qplug.cli.main.main({list(words)}, standalone_mode=False) in (None, 0)\n"
    )


def test_heavy_modules_would_be_seen() -> None:
    assert "safetensors" in imported_by("import safetensors")


@pytest.mark.parametrize(
    "code",
    [
        "import qplug, qplug.api, qplug.api.hookspecs, qplug.api.scheme, qplug.api.params",
        "import qplug.cli.main",
        run("--help"),
        run("--version"),
        run("plugins", "--help"),
        run("plugins", "list"),
        run("completion", "zsh"),
        run("schemes"),
        run("schemes", "W4A16", "--gpu", "H100"),
        run("plan", "qplug:demo", "--gpu", "H100x2"),
        run("config", "--help"),
        "from qplug.cli.health import machine_findings, hub_findings\nlist(machine_findings())",
        "from click.shell_completion import ShellComplete as S; from qplug.cli.main import main\n"
        "S(main, {}, 'qplug', 'X').get_completions(['quantize', '--algo'], '')",
    ],
)
def test_torch_is_not_imported_by(code: str) -> None:
    assert not imported_by(code) & set(HEAVY)


#: Imports each face, and tells which was the first to import something heavy.
IMPORTS = """
import sys
from importlib import import_module
for face in {faces}:
    import_module(face)
    heavy = {{*{heavy}}} & {{*sys.modules}}
    assert not heavy, f"{{face}} imports {{heavy}}"
"""


def test_the_faces_of_plugins_import_no_torch() -> None:
    """All in one process: what none of them imports there, each imports nowhere."""
    faces = [face.parent.name for face in FACES]
    assert {*faces} <= imported_by(IMPORTS.format(faces=faces, heavy=HEAVY))


def test_a_face_that_imports_torch_would_be_named(tmp_path: Path) -> None:
    for name, code in (("light", "import json"), ("heavy", "import safetensors")):
        (tmp_path / f"{name}.py").write_text(code)
    with pytest.raises(AssertionError, match=r"heavy imports .*'safetensors'"):
        imported_by(IMPORTS.format(faces=["light", "heavy"], heavy=HEAVY), tmp_path)


def test_every_plugin_has_a_face() -> None:
    folders = [path for path in (ROOT / "plugins").glob("*/*") if path.is_dir()]
    packages = [path for path in folders if path.name != "__pycache__"]
    assert {path.parent for path in FACES} == set(packages)
    assert all(path.name.startswith("qplug_") for path in packages)
