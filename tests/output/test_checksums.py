"""Checksums of tensors, headers, files and of qplug.json itself."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qplug.output.checksums import (
    crc32,
    file_checksum,
    header_checksum,
    record_checksum,
    sealed,
)

RECORD = {"version": 1, "model": "a/ü", "layers": {"x": {"error": 0.1, "loss": None}}, "online": []}


def test_pieces_are_summed_as_one() -> None:
    assert crc32([b"ab", memoryview(b"c")]) == zlib.crc32(b"abc")
    assert crc32([]) == 0


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 1_000_000)
    expected = {"bytes": 3_000_000, "crc32": zlib.crc32(b"abc" * 1_000_000)}
    assert file_checksum(tmp_path / "a") == expected


def test_a_header_ends_where_tensors_begin(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(3)}, file)
    data = file.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    assert header_checksum(file) == zlib.crc32(data[:length])
    file.write_bytes(data[:-1] + b"\x07")
    assert header_checksum(file) == zlib.crc32(data[:length])
    file.write_bytes(b"\xff" * 20)
    assert header_checksum(file) == zlib.crc32(b"\xff" * 20)


def test_a_record_is_sealed_by_its_last_key() -> None:
    whole = sealed(RECORD)
    assert list(whole) == [*RECORD, "checksum"]
    text = json.dumps(RECORD, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert whole["checksum"] == zlib.crc32(text.encode())
    assert sealed(whole) == whole
    read = json.loads(json.dumps(whole, indent=2))
    assert record_checksum(read) == read["checksum"]
    read["layers"]["x"]["error"] = 0.2
    assert record_checksum(read) != read["checksum"]


def test_a_record_with_nan_has_no_checksum() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        record_checksum({"error": math.nan})
