"""Each weight of the source is read once, and not too many are held at once."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qplug.checkpoint import tensor_file
from qplug.checkpoint.finite import Magnitudes
from qplug.checkpoint.locate import DEMO, find_model
from qplug.checkpoint.open import open_checkpoint
from qplug.checkpoint.tensor_file import FileTensor
from qplug.errors import QplugError
from qplug.output import source_bytes, writer
from qplug.output.journal import Journal
from qplug.output.source_bytes import SourceBytes
from qplug.output.writer import Writer
from qplug.run import streamed
from qplug.run.quantize import quantize

#: What a run with each algorithm needs besides.
TEXT = {
    "rtn": {},
    "gptq": {
        "dataset": "text",
        "dataset_options": {"path": __file__},
        "samples": 4,
        "seq_len": 32,
    },
}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[Path, int]]:
    """How often each tensor in a file was read."""
    times: Counter[tuple[Path, int]] = Counter()
    read_into, chunks = FileTensor.read_into, FileTensor.chunks

    def counted(tensor: FileTensor, buffer: Tensor) -> Tensor:
        times[tensor.path, tensor.start] += 1
        return read_into(tensor, buffer)

    def counted_chunks(tensor: FileTensor) -> Iterator[bytes]:
        times[tensor.path, tensor.start] += 1
        return chunks(tensor)

    monkeypatch.setattr(FileTensor, "read_into", counted)
    monkeypatch.setattr(FileTensor, "chunks", counted_chunks)
    return times


@pytest.mark.parametrize("algo", TEXT)
def test_each_tensor_is_read_once(
    algo: str, read: Counter[tuple[Path, int]], tmp_path: Path
) -> None:
    quantize(DEMO, tmp_path / "out", algo=algo, **TEXT[algo])  # type: ignore[arg-type]
    tensors = open_checkpoint(find_model(DEMO)).tensors
    places = {(t.path, t.start) for t in tensors.values() if isinstance(t, FileTensor)}
    assert len(places) == len(tensors)
    if algo == "gptq":  # the embedding is computed and copied, norms are small
        places = {(t.path, t.start) for name, t in tensors.items() if "proj" in name}
    assert {place: read[place] for place in places} == dict.fromkeys(places, 1)


@pytest.mark.parametrize("algo", TEXT)
def test_checksums_of_bytes_in_memory_are_those_of_the_files(
    algo: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    noted: dict[int, int] = {}
    append, of_step = Journal.append, SourceBytes.of_step
    sources: list[SourceBytes] = []

    def keep(journal: Journal, entry: dict[str, int]) -> None:
        if "step" in entry:
            noted[entry["step"]] = json.loads(json.dumps(entry))["source"]
        append(journal, entry)

    def keep_source(source: SourceBytes, number: int) -> int:
        sources.append(source)
        return of_step(source, number)

    monkeypatch.setattr(Journal, "append", keep)
    monkeypatch.setattr(SourceBytes, "of_step", keep_source)
    quantize(DEMO, tmp_path / "out", algo=algo, **TEXT[algo])  # type: ignore[arg-type]
    source = sources[0]
    of_files = SourceBytes(source._plan, open_checkpoint(find_model(DEMO)), source._blocks)
    assert noted == {number: of_step(of_files, number) for number in noted}
    assert len(noted) > 5


def test_weights_read_ahead_are_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    steps = streamed.Steps.weights
    quantized = streamed.Steps.quantized
    held, most, lock = 0, 0, threading.Lock()

    def reading(self: streamed.Steps, step: object) -> dict[str, Tensor]:
        nonlocal held, most
        weights = steps(self, step)  # type: ignore[arg-type]
        with lock:
            held += sum(weight.nbytes for weight in weights.values())
            most = max(most, held)
        return weights

    def computing(
        self: streamed.Steps, number: int, read: dict[str, Tensor], quantize: object
    ) -> object:
        nonlocal held
        with lock:
            held -= sum(weight.nbytes for weight in read.values())
        return quantized(self, number, read, quantize)  # type: ignore[arg-type]

    monkeypatch.setattr(streamed, "_AHEAD", 1 << 19)
    monkeypatch.setattr(streamed.Steps, "weights", reading)
    monkeypatch.setattr(streamed.Steps, "quantized", computing)
    quantize(DEMO, tmp_path / "out", algo="rtn")
    largest = max(
        tensor.nbytes
        for name, tensor in open_checkpoint(find_model(DEMO)).tensors.items()
        if "proj" in name
    )
    assert 0 < most <= (1 << 19) + largest
    assert held == 0
    assert source_bytes.READERS > 1


def test_small_steps_share_a_sync(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A disk that needs a while for a sync does not take it for each tensor of a small model."""
    fsync, write, several = os.fsync, Writer.write, threading.Event()
    written, syncs = [0], [0]

    def count(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        written[0] += 1
        if written[0] == 12:
            several.set()

    def slow(file: int) -> None:
        if threading.current_thread().name.startswith("qplug-noting"):
            syncs[0] += 1
            assert several.wait(20)  # twelve steps are written before the first is on the disk
        fsync(file)

    monkeypatch.setattr(Writer, "write", count)
    monkeypatch.setattr(os, "fsync", slow)
    quantize(DEMO, tmp_path / "out", algo="rtn")
    assert syncs[0] <= written[0] - 10


def test_no_more_steps_wait_for_the_disk_than_shards_are_open() -> None:
    assert writer._MOST_PENDING < writer._OPEN_SHARDS


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 1])
def test_a_copied_tensor_is_read_while_it_is_written(
    shard_bytes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Pieces of a copied tensor come from another thread, in order, and are the tensor's."""
    monkeypatch.setattr(writer, "_SMALL", 1 << 10)
    monkeypatch.setattr(tensor_file, "_CHUNK", 1 << 16)
    readers = set()
    problem = Magnitudes.problem

    def noted(numbers: Magnitudes, piece: bytes | memoryview) -> str | None:
        if len(piece) == 1 << 16:
            readers.add(threading.current_thread().name.rpartition("_")[0])
        return problem(numbers, piece)

    monkeypatch.setattr(Magnitudes, "problem", noted)
    quantize(DEMO, tmp_path / "out", algo="rtn", shard_bytes=shard_bytes)
    assert "qplug-copying" in readers
    source, copy = open_checkpoint(find_model(DEMO)), open_checkpoint(tmp_path / "out")
    same = source.tensors.keys() & copy.tensors.keys()
    assert "model.embed_tokens.weight" in same
    for name in same:
        assert torch.equal(copy.read(name), source.read(name)), name


def test_a_fault_in_the_last_piece_of_a_copied_tensor_stops_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(writer, "_SMALL", 1 << 10)
    monkeypatch.setattr(tensor_file, "_CHUNK", 1 << 16)
    shutil.copytree(find_model(DEMO), tmp_path / "model")
    place = open_checkpoint(tmp_path / "model").tensors["model.embed_tokens.weight"]
    assert isinstance(place, FileTensor)
    with place.path.open("r+b") as file:
        file.seek(place.start + place.nbytes - 2)
        file.write(b"\xff\xff")  # NaN
    with pytest.raises(QplugError, match=r"embed_tokens.*has NaN"):
        quantize(str(tmp_path / "model"), tmp_path / "out", algo="rtn")
    assert not (tmp_path / "out").exists()
