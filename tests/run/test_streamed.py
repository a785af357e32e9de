"""Runs without data: each byte of the source is read once, and not too many are held at once."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

from qplug.checkpoint.locate import DEMO, find_model
from qplug.checkpoint.open import open_checkpoint
from qplug.checkpoint.tensor_file import FileTensor
from qplug.output import source_bytes
from qplug.output.journal import Journal
from qplug.output.source_bytes import SourceBytes
from qplug.run import streamed
from qplug.run.quantize import quantize


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


def test_each_tensor_is_read_once(read: Counter[tuple[Path, int]], tmp_path: Path) -> None:
    quantize(DEMO, tmp_path / "out", algo="rtn")
    tensors = open_checkpoint(find_model(DEMO)).tensors.values()
    places = {(t.path, t.start) for t in tensors if isinstance(t, FileTensor)}
    assert len(places) == len(tensors)
    assert {place: read[place] for place in places} == dict.fromkeys(places, 1)


def test_checksums_of_bytes_in_memory_are_those_of_the_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    noted: dict[int, int] = {}
    append, of_step = Journal.append, SourceBytes.of_step
    sources: list[SourceBytes] = []

    def keep(journal: Journal, entry: dict[str, int]) -> None:
        if "step" in entry:
            noted[entry["step"]] = json.loads(json.dumps(entry))["source"]
        append(journal, entry)

    def keep_source(source: SourceBytes, number: int, known: dict[str, int]) -> int:
        sources.append(source)
        return of_step(source, number, known)

    monkeypatch.setattr(Journal, "append", keep)
    monkeypatch.setattr(SourceBytes, "of_step", keep_source)
    quantize(DEMO, tmp_path / "out", algo="rtn")
    assert noted == {number: of_step(sources[0], number) for number in noted}
    assert len(noted) > 20


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
