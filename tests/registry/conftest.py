from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest


class Environment:
    """A virtual environment at ``folder`` that sees the packages of this one."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False)
        self.python = folder / "bin" / "python"
        (inner,) = folder.glob("lib/python*/site-packages")
        # Not a plain path: qplug itself is reached through a .pth file of that folder.
        here = sysconfig.get_path("purelib")
        (inner / "outer.pth").write_text(f"import site; site.addsitedir({here!r})\n")

    def install(self, *packages: Path) -> None:
        """Without a network: what builds them is here already."""
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--quiet"]
        offline = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
        subprocess.run([*pip, *offline, *map(str, packages)], check=True)

    def run(self, *words: object, folder: Path) -> str:
        """What ``python WORDS`` prints in ``folder``; a failure of it is one of the test."""
        done = subprocess.run(
            [str(self.python), *map(str, words)],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """An environment as a stranger has it."""
    return Environment(tmp_path / "venv")
