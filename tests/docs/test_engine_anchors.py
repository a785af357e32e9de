"""tools/engine_anchors.py tells what changed in an engine's wheel; its file is complete."""

from __future__ import annotations

import importlib.util
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from qplug.registry.registry import Registry

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("engine_anchors", ROOT / "tools/engine_anchors.py")
assert _spec is not None
assert _spec.loader is not None
tool: Any = importlib.util.module_from_spec(_spec)
sys.modules["engine_anchors"] = tool
_spec.loader.exec_module(tool)

OLD = {
    "house/load.py": '''
"""The loader."""
SIZES: list[int] = [32, 64]
try:
    import fast
except ImportError:
    fast = None


class Loader:
    def read(self, name):
        """Reads."""
        return open(name)  # a comment

    def close(self): pass
''',
    "house/gone.py": "def pick():\n    return 1\n",
    "house/models/a.py": "from x import remap\n",
    "house/models/b.py": "remapped = 1\n",
}
ANCHORS = {
    "house": [
        {"file": "house/load.py", "name": "SIZES", "rests": "group sizes"},
        {"file": "house/load.py", "name": "Loader.read", "rests": "reading"},
        {"file": "house/load.py", "name": "fast", "rests": "the fast way"},
        {"file": "house/load.py", "name": "", "rests": "all of it"},
        {"file": "house/gone.py", "name": "pick", "rests": "picking"},
        {"file": "house/new.py", "name": "Later", "rests": "what comes"},
        {"file": "house/models", "name": "", "rests": "models", "word": "remap"},
    ]
}


def wheel(folder: Path, version: str, files: dict[str, str]) -> Path:
    """A wheel with ``files``, and one that is no Python."""
    path = folder / f"house-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as made:
        for name, text in {**files, "house/kernel.so": "\0"}.items():
            made.writestr(name, text)
    return path


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of places, with what version 1.9.0 has at each."""
    path = tmp_path / "anchors.json"
    path.write_text(json.dumps(ANCHORS))
    monkeypatch.setattr(tool, "ANCHORS", path)
    for function in (tool.read_anchors, tool.record):
        monkeypatch.setattr(function, "__defaults__", (path,))
    old = wheel(tmp_path, "1.9.0", OLD)
    assert tool.main(["house", str(old), "--record"]) == 0
    return old


def told(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, list[str]]:
    capsys.readouterr()
    status = tool.main([str(word) for word in words])
    return status, capsys.readouterr().out.splitlines()


def test_comments_docstrings_and_layout_do_not_count(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = OLD["house/load.py"].replace("Reads.", "Gives.").replace("  # a comment", "")
    text = text.replace("[32, 64]", "[\n    32,\n    64,\n]").replace("The loader.", "A loader.")
    new = wheel(tmp_path, "1.10.0", {**OLD, "house/load.py": text})
    assert told(capsys, "house", new) == (0, ["1.10.0 against 1.9.0: 7 same"])


def test_what_changed_is_told_with_what_rests_on_it(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        **OLD,
        "house/load.py": OLD["house/load.py"].replace("[32, 64]", "[32, 128]"),
        "house/new.py": "class Later:\n    pass\n",
        "house/moved.py": OLD["house/gone.py"],
        "house/models/b.py": "remap = 1\n",
    }
    del files["house/gone.py"], files["house/models/a.py"]
    new = wheel(tmp_path, "1.10.0", files)
    status, lines = told(capsys, "house", new)
    assert status == 1
    assert lines == [
        "changed  house/load.py SIZES",
        "         rests on it: group sizes",
        "changed  house/load.py",
        "         rests on it: all of it",
        "gone     house/gone.py pick",
        "         rests on it: picking",
        "         the name is in house/moved.py",
        "new      house/new.py Later",
        "         rests on it: what comes",
        "changed  house/models remap",
        "         rests on it: models",
        "         + house/models/b.py",
        "         - house/models/a.py",
        "1.10.0 against 1.9.0: 3 changed, 1 gone, 1 new, 2 same",
    ]
    _, lines = told(capsys, "house", new, "--diff", recorded)
    assert "-SIZES: list[int] = [32, 64]" in lines
    assert "+SIZES: list[int] = [32, 128]" in lines
    assert not any("def read" in line for line in lines if line[:1] in "+-")
    # Once it is recorded, it is what the next version is compared with, by numbers.
    assert told(capsys, "house", new, "--record")[0] == 1
    assert told(capsys, "house", new, "--against", "1.10.0")[0] == 0
    next_one = wheel(tmp_path, "1.11.0", files)
    assert told(capsys, "house", next_one) == (0, ["1.11.0 against 1.10.0: 7 same"])


def test_an_installed_package_is_a_folder(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "site-packages"
    for name, text in OLD.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    (site / "house_cpu-1.9.3.dist-info").mkdir()
    assert told(capsys, "house", site) == (0, ["1.9.3 against 1.9.0: 7 same"])


def test_places_are_recorded_for_the_newest_release_of_each_table() -> None:
    held = json.loads((ROOT / "tools/engine_anchors.json").read_text("utf-8"))
    exporters = Registry.installed(only_shipped=True).exporters
    for name, places in held.items():
        engine = exporters[name].engine
        newest = next(iter(engine.releases)).rpartition(" ")[2] if engine else ""
        for place in places:
            assert place["known"][newest], place
            assert place["rests"]
        keys = [(place["file"], place["name"], place.get("word")) for place in places]
        assert len(set(keys)) == len(keys)
