"""A run that cannot be read has no dataset; the run itself says what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from qplug.output.unfinished import begun_dataset


@pytest.mark.parametrize("text", ["", "[1", "{}", '{"recipe": {"calibration": null}}'])
def test_a_manifest_that_names_no_dataset(text: str, tmp_path: Path) -> None:
    (tmp_path / "qplug.json").write_text(text)
    assert begun_dataset(tmp_path) is None


@pytest.mark.parametrize("out", ["/", ".", "missing/folder", "a\0b"])
def test_a_name_without_a_run(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert begun_dataset(Path(out)) is None
