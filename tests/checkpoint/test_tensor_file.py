"""Files are those of the safetensors library, byte for byte, and unsound ones are refused."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qplug.api import TensorSpec
from qplug.checkpoint.tensor_file import CODES, lay_out, read_header, tensor_bytes
from qplug.errors import QplugError

# Names that a header can hold: JSON has no lone surrogates.
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
specs = st.builds(TensorSpec, st.sampled_from(sorted(CODES)), shapes)


def random_tensor(spec: TensorSpec, generator: torch.Generator) -> Tensor:
    count = math.prod(spec.shape)
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if dtype == torch.bool:  # other bytes than 0 and 1 are no bool
        return torch.randint(0, 2, spec.shape, generator=generator).bool()
    bits = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator)
    return bits.to(torch.uint8).view(dtype).view(spec.shape)


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    header, places = lay_out(
        path, {n: TensorSpec(str(t.dtype)[6:], tuple(t.shape)) for n, t in tensors.items()}
    )
    with path.open("wb") as file:
        file.write(header)
        for name, tensor in reversed(tensors.items()):  # in any order: places are known
            file.seek(places[name].start)
            file.write(tensor_bytes(tensor))


# --- the format ----------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    st.dictionaries(names.filter(lambda name: name != "__metadata__"), specs, max_size=6),
    st.integers(0, 2**32),
)
def test_files_are_those_of_the_library(wanted: dict[str, TensorSpec], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: random_tensor(spec, generator) for name, spec in wanted.items()}
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours"), Path(folder, "theirs")
        write(ours, tensors)
        safetensors.torch.save_file(tensors, theirs, {"format": "pt"})
        assert ours.read_bytes() == theirs.read_bytes()

        found = read_header(theirs)
        assert {name: stored.spec for name, stored in found.items()} == wanted
        for name, stored in found.items():
            whole = tensor_bytes(tensors[name]).tobytes()
            assert stored.nbytes == wanted[name].nbytes == len(whole)
            assert stored.read().dtype == tensors[name].dtype
            assert stored.read().shape == tensors[name].shape
            assert tensor_bytes(stored.read()).tobytes() == whole
            assert b"".join(stored.chunks()) == whole


def test_tensors_that_are_not_contiguous(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    write(tmp_path / "file", {"t": tensor.T})
    torch.testing.assert_close(read_header(tmp_path / "file")["t"].read(), tensor.T)


def test_what_is_read_is_its_own(tmp_path: Path) -> None:
    write(tmp_path / "file", {"t": torch.ones(4)})
    stored = read_header(tmp_path / "file")["t"]
    stored.read().zero_()
    assert stored.read().tolist() == [1, 1, 1, 1]


def test_large_tensors_come_in_pieces(tmp_path: Path) -> None:
    tensor = torch.randint(0, 256, (40_000_000,), dtype=torch.uint8)
    write(tmp_path / "file", {"t": tensor})
    pieces = list(read_header(tmp_path / "file")["t"].chunks())
    assert max(map(len, pieces)) <= 1 << 24
    assert b"".join(pieces) == tensor.numpy().tobytes()


# --- files that are refused ----------------------------------------------------------------------


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


def file_of(header: object, data: bytes = b"", *, told: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if told is None else told).to_bytes(8, "little") + text + data


def test_a_sound_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(file_of({"t": entry()}, b"\0" * 8))
    assert read_header(tmp_path / "file")["t"].read().tolist() == [0, 0]


UNSOUND = {
    "empty": (b"", "not a sound safetensors file: it has no header"),
    "shorter than its length": (b"\2\0\0", "not a sound safetensors file: it has no header"),
    "a header of 100 MB": (file_of({}, told=100_000_001), "it has no header"),
    "a header that is cut short": (file_of({}, told=3), "its header is cut short"),
    "no header": (file_of(b""), "not a sound safetensors file: Expecting value"),
    "not JSON": (file_of(b"{'t'}"), "not a sound safetensors file: Expecting property name"),
    "not UTF-8": (file_of(b'{"\xff"}'), "not a sound safetensors file: not UTF-8, at byte 2"),
    "JSON, but no mapping": (file_of([1, 2]), "its header is no mapping"),
    "an entry that is no mapping": (file_of({"t": [1]}), "not a sound safetensors file"),
    "an entry that is null": (file_of({"t": None}), "not a sound safetensors file"),
    "no dtype": (file_of({"t": {"shape": [], "data_offsets": [0, 4]}}, bytes(4)), "'dtype'"),
    "no shape": (file_of({"t": {"dtype": "I8", "data_offsets": [0, 1]}}, bytes(1)), "'shape'"),
    "no offsets": (file_of({"t": {"dtype": "I8", "shape": [1]}}, bytes(1)), "'data_offsets'"),
    "an unknown dtype": (file_of({"t": entry(dtype="F31")}, bytes(8)), "dtype F31 is not known"),
    "a dtype that is no text": (file_of({"t": entry(dtype=["F32"])}, bytes(8)), "is not known"),
    "a negative side": (file_of({"t": entry(shape=[-2])}, bytes(8)), "[-2] is no shape"),
    "a side that is no number": (file_of({"t": entry(shape=["2"])}, bytes(8)), "is no shape"),
    "a side that is true": (file_of({"t": entry(shape=[2, True])}, bytes(8)), "is no shape"),
    "a shape that is a number": (file_of({"t": entry(shape=2)}, bytes(8)), "2 is no shape"),
    "a huge shape": (file_of({"t": entry(shape=[10**30])}, bytes(8)), "is too large a shape"),
    "nesting": (file_of(b"[" * 100_000), "nested more than 64 deep"),
    "many digits": (file_of(b'{"t": ' + b"1" * 5000 + b"}"), "more than 64 digits"),
    "one offset": (file_of({"t": entry(data_offsets=[0])}, bytes(8)), "[0] are no offsets"),
    "three offsets": (file_of({"t": entry(data_offsets=[0, 8, 8])}, bytes(8)), "are no offsets"),
    "offsets with a point": (file_of({"t": entry(data_offsets=[0.0, 8])}, bytes(8)), "no offsets"),
    "offsets that are null": (file_of({"t": entry(data_offsets=None)}, bytes(8)), "no offsets"),
    "offsets for another shape": (file_of({"t": entry(shape=[3])}, bytes(8)), "t is out of place"),
    "a negative offset": (file_of({"t": entry(data_offsets=[-8, 0])}, bytes(8)), "are no offsets"),
    "offsets turned round": (file_of({"t": entry(data_offsets=[8, 0])}, bytes(8)), "out of place"),
    "overlapping tensors": (
        file_of({"t": entry(), "u": entry(data_offsets=[4, 12])}, bytes(12)),
        "u is out of place",
    ),
    "tensors on one another": (file_of({"t": entry(), "u": entry()}, bytes(8)), "is out of place"),
    "a hole before": (file_of({"t": entry(data_offsets=[4, 12])}, bytes(12)), "t is out of place"),
    "a hole between": (
        file_of({"t": entry(), "u": entry(data_offsets=[12, 20])}, bytes(20)),
        "u is out of place",
    ),
    "truncated data": (file_of({"t": entry()}, bytes(7)), "cut short: its header describes"),
    "no data": (file_of({"t": entry()}), "cut short: its header describes"),
    "trailing bytes": (file_of({"t": entry()}, bytes(9)), "too long: its header describes"),
    "trailing bytes, and no tensor": (file_of({}, bytes(1)), "too long: its header describes"),
}


@pytest.mark.parametrize(("data", "complaint"), UNSOUND.values(), ids=UNSOUND)
def test_refused(data: bytes, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(QplugError) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert complaint in str(caught.value)
    with pytest.raises(safetensors.SafetensorError):  # and it is no whim: so does the library
        safetensors.torch.load_file(path)


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: None], ids=["a folder", "nothing"])
def test_what_cannot_be_opened(make: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    make(path)
    with pytest.raises(QplugError, match="cannot be read"):
        read_header(path)


def test_any_damage_to_a_header_is_refused_or_harmless(tmp_path: Path) -> None:
    """No byte changed raises anything but QplugError, or gives tensors outside of the file."""
    path = tmp_path / "model.safetensors"
    header = {
        "__metadata__": {"format": "pt"},
        "t": entry(),
        "u": entry(dtype="I8", shape=[2, 3], data_offsets=[8, 14]),
    }
    sound = file_of(header, bytes(14))
    refused = 0
    for place in range(len(sound)):
        for bit in range(8):
            damaged = bytearray(sound)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                tensors = read_header(path)
            except QplugError:
                refused += 1
            else:
                assert all(
                    tensor.start + tensor.nbytes <= len(sound) for tensor in tensors.values()
                )
    assert refused > len(sound) * 4


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, {"t": torch.ones(100)})
    stored = read_header(path)["t"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(QplugError, match="became shorter while it was read"):
        stored.read()
    with pytest.raises(QplugError, match="became shorter while it was read"):
        list(stored.chunks())
