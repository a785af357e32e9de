"""An exporter whose engine reads one file of another format: written, read back, resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import qplug
from qplug import (
    Checkpoint,
    Exporter,
    ModelView,
    NoParams,
    QplugError,
    Scheme,
    SingleFile,
    StoredTensor,
)
from qplug.checkpoint.tensor_file import read_header
from qplug.errors import StageError
from qplug.testing import registry_with, write_tiny_model
from qplug_compressed_tensors.format import CompressedTensors


class Reversed(SingleFile):
    """All tensors in one file, under names that are turned round."""

    name = "model.one"

    def write(
        self, finished: Checkpoint, model: ModelView, schemes: Mapping[str, Scheme], path: Path
    ) -> None:
        assert (finished.folder / "tokenizer.json").is_file()
        save_file({name[::-1]: finished.read(name) for name in finished.tensors}, path)

    def read(self, path: Path, config: Mapping[str, Any]) -> dict[str, StoredTensor]:
        return {name[::-1]: tensor for name, tensor in read_header(path).items()}


class InOneFile(CompressedTensors):
    """The tensors of compressed-tensors, in one file."""

    single_file = Reversed()


class OneFile(Exporter[NoParams]):
    """All tensors in one file."""

    name = "one-file"
    format = InOneFile()


def with_file(file: SingleFile) -> type[OneFile]:
    """``OneFile`` with another way to write it."""
    stored_as = type("Other", (InOneFile,), {"single_file": file})()
    return type("Other", (OneFile,), {"__doc__": "Another.", "format": stored_as})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def run(model: Path, out: Path, kind: type[OneFile] = OneFile) -> qplug.Result:
    return qplug.quantize(
        str(model),
        out,
        scheme="W8A16",
        group_size=32,
        backend=kind.name,
        shard_bytes=30_000,
        device="cpu",
        registry=registry_with(kind),
    )


def test_the_file_takes_the_place_of_all_shards(model: Path, tmp_path: Path) -> None:
    out = run(model, tmp_path / "out").out
    assert (out / "model.one").is_file()
    assert not list(out.glob("*.safetensors*"))
    assert json.loads((out / "config.json").read_text())["quantization_config"]
    registry = registry_with(OneFile)
    found = qplug.verify(str(out), registry=registry)
    assert found.ok, found.problems
    assert len(found.errors) == 14
    assert qplug.load(str(out), registry=registry).num_parameters()
    with pytest.raises(QplugError, match="no backend 'one-file'"):
        qplug.verify(str(out))


def test_one_that_breaks_or_writes_nothing_is_named(model: Path, tmp_path: Path) -> None:
    class Forgetful(Reversed):
        def write(self, *_: Any) -> None: ...

    class Broken(Reversed):
        def write(self, *_: Any) -> None:
            raise ZeroDivisionError("no header")

    for file, sentence in ((Forgetful(), "left no model.one"), (Broken(), "no header")):
        with pytest.raises(StageError, match=f"plugin one-file .*: model.one: .*{sentence}"):
            run(model, tmp_path / "out", with_file(file))
    # What was computed is there, and the mended exporter goes on with it.
    assert run(model, tmp_path / "out").resumed
    assert (tmp_path / "out" / "model.one").is_file()


def test_there_must_be_room_for_both_forms(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = run(model, tmp_path / "first").bytes
    usage = shutil.disk_usage(tmp_path)._replace(free=need + need // 2)
    monkeypatch.setattr("qplug.output.writer.shutil.disk_usage", lambda path: usage)
    with pytest.raises(QplugError, match="the disk is full"):
        run(model, tmp_path / "second")
