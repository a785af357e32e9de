"""``qplug verify`` notices every bit that changed in a finished folder."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
from click.testing import Result

from qplug.checkpoint.locate import DEMO, find_model
from qplug.output.checksums import sealed
from qplug.output.manifest import MANIFEST
from qplug.reading.damage import find_damage

Cli: TypeAlias = Callable[..., Result]

FLIPS = 40
SCHEMES = ("W4A16", "FP8_DYNAMIC", "W8A8")


@pytest.fixture(scope="module", params=SCHEMES)
def finished(
    request: pytest.FixtureRequest, cli: Cli, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder that nobody has touched; its float model is not at hand."""
    base = tmp_path_factory.mktemp("damage")
    model = Path(shutil.copytree(find_model(DEMO), base / "model"))
    out = base / "out"
    result = cli("quantize", model, "--algo", "rtn", "--scheme", request.param, "--out", out)
    assert result.exit_code == 0, result.output
    shutil.rmtree(model)
    return out


def flipped(folder: Path, path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_an_untouched_folder_is_sound(finished: Path, cli: Cli) -> None:
    result = cli("verify", finished, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads((finished / MANIFEST).read_text())
    stated = record["checksums"]
    count = sum(len(stated[kind]) for kind in ("tensors", "headers", "files"))
    assert json.loads(result.stdout)["checksums"] == count + 1
    assert {*stated["headers"], *stated["files"], MANIFEST} == {
        path.relative_to(finished).as_posix() for path in files_of(finished)
    }


def test_every_flip_is_noticed(finished: Path) -> None:
    """Random bits, as many in each file as its share of all bytes, and some in every file."""
    paths = files_of(finished)
    chosen = random.Random(13)
    weights = [path.stat().st_size for path in paths]
    places = chosen.choices(paths, weights, k=FLIPS) + [path for path in paths for _ in range(3)]
    for path in places:
        bit = chosen.randrange(8 * path.stat().st_size)
        flipped(finished, path, bit)
        try:
            assert notices(finished), (path.name, bit)
        finally:
            flipped(finished, path, bit)
    assert not notices(finished)


def notices(folder: Path) -> bool:
    from qplug import QplugError

    try:
        return bool(find_damage(folder).problems)
    except QplugError:
        return True


def test_a_flip_in_a_code_is_named(finished: Path, cli: Cli, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "spoilt"))
    shard = folder / "model.safetensors"
    flipped(folder, shard, 8 * (shard.stat().st_size - 1))
    result = cli("verify", folder)
    assert result.exit_code == 1
    assert "damaged: " in result.stdout
    assert "differs from its checksum in qplug.json" in result.stdout
    assert "not sound: 1 problem" in result.stdout


def test_a_file_that_is_gone_or_longer(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "spoilt"))
    with (folder / "config.json").open("a") as file:
        file.write(" ")
    (folder / "README.md").unlink()
    (folder / "notes.txt").write_text("qplug did not write this file, so it says nothing of it")
    found = {problem.where: problem.message for problem in find_damage(folder).problems}
    assert found == {
        "config.json": "differs from its checksum in qplug.json",
        "README.md": "has a checksum in qplug.json, but is not here",
    }


def test_checksums_that_name_other_files_read_nothing(finished: Path, tmp_path: Path) -> None:
    """A stranger's qplug.json cannot make qplug read a file outside of the folder."""
    folder = Path(shutil.copytree(finished, tmp_path / "spoilt"))
    (tmp_path / "secret").write_text("secret")
    record = json.loads((folder / MANIFEST).read_text())
    record["checksums"]["files"] = {"../secret": {"bytes": 6, "crc32": 0}, "/dev/zero": {}}
    (folder / MANIFEST).write_text(json.dumps(sealed(record)))
    messages = {problem.message for problem in find_damage(folder).problems}
    assert messages == {"has a checksum in qplug.json, but is not here"}


@pytest.mark.parametrize("value", [None, 5, [], {}, {"kind": "crc32"}, {"files": {"a": 1}}])
def test_checksums_that_are_none(finished: Path, tmp_path: Path, value: object) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "spoilt"))
    record = json.loads((folder / MANIFEST).read_text())
    record["checksums"] = value
    (folder / MANIFEST).write_text(json.dumps(sealed(record)))
    assert find_damage(folder).problems


def test_a_folder_without_checksums_says_so(finished: Path, cli: Cli, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "old"))
    record = json.loads((folder / MANIFEST).read_text())
    del record["checksums"], record["checksum"]
    (folder / MANIFEST).write_text(json.dumps(record))
    result = cli("verify", folder)
    assert result.exit_code == 0
    assert "this folder has no checksums: damage to its codes cannot be noticed" in result.stdout
