"""Which files of a folder its manifest lists: it is read once, until it changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import qplug
from qplug.output import ownership
from qplug.output.ownership import written_names


def test_the_manifest_is_read_again_only_if_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    qplug.quantize("qplug:demo", out, algo="rtn", scheme="W8A16", backend="fake")
    read: list[Path] = []
    reads = ownership.read_json
    monkeypatch.setattr(ownership, "read_json", lambda path: read.append(path) or reads(path))

    first = written_names(out)
    assert first
    assert "model.safetensors" in first
    assert written_names(out) == first
    assert len(read) == 1

    manifest = out / "qplug.json"
    changed = json.loads(manifest.read_text())
    changed["checksums"]["files"]["notes.txt"] = {}
    manifest.write_text(json.dumps(changed))
    assert written_names(out) == first | {"notes.txt"}
    manifest.unlink()
    assert written_names(out) is None
