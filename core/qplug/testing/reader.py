"""The contract of readers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qplug.api import Checkpoint, Reader
from qplug.checkpoint.open import open_checkpoint
from qplug.checkpoint.tensor_file import tensor_bytes
from qplug.errors import QplugError
from qplug.testing.checking import demand, demanding


class ReaderContract:
    """The tests of a reader: ``class TestMine(ReaderContract): reader = Mine()``.

    ``write`` writes a small checkpoint in the format of the reader.
    """

    reader: Reader

    @abstractmethod
    def write(self, folder: Path) -> Mapping[str, Tensor]:
        """Writes ``config.json`` and ``model.safetensors`` into ``folder``.

        Returns the tensors of the float checkpoint that these stand for, by name, in their dtypes.
        """

    @pytest.fixture
    def written(self, tmp_path: Path) -> tuple[Checkpoint, Mapping[str, Tensor]]:
        """The checkpoint that ``write`` wrote, as it is stored, and the float tensors."""
        floats = self.write(tmp_path)
        return open_checkpoint(tmp_path), floats

    def test_it_reads_its_own_folders_alone(
        self, written: tuple[Checkpoint, Mapping[str, Tensor]]
    ) -> None:
        stored, _ = written
        demand(self.reader.reads(stored.config), f"{self._who}.reads refuses its own config.json")
        demand(not self.reader.reads({}), f"{self._who}.reads takes an empty config.json")

    def test_tensors_are_those_of_the_float_model(
        self, written: tuple[Checkpoint, Mapping[str, Tensor]]
    ) -> None:
        stored, floats = written
        config, tensors = self.reader.as_float(stored.config, stored.tensors)
        demand(
            not Reader.quantization(config),
            f"{self._who}.as_float leaves the quantization in config.json",
        )
        demand(
            tensors.keys() == floats.keys(),
            f"{self._who}.as_float gives {sorted(tensors)}, not {sorted(floats)}",
        )
        for name, wanted in floats.items():
            value = tensors[name].read()
            spec = (str(wanted.dtype).removeprefix("torch."), tuple(wanted.shape))
            demand(
                (tensors[name].spec.dtype, tensors[name].spec.shape) == spec,
                f"{name}: its spec is {tensors[name].spec}, not {spec}",
            )
            demand(
                value.dtype == wanted.dtype and torch.equal(value, wanted),
                f"{name}: it is read as another tensor than the float model has",
            )

    def test_rows_and_bytes_are_those_of_the_whole(
        self, written: tuple[Checkpoint, Mapping[str, Tensor]]
    ) -> None:
        stored, _ = written
        _, tensors = self.reader.as_float(stored.config, stored.tensors)
        for name, tensor in tensors.items():
            whole = tensor.read()
            half = slice(0, -(-len(whole) // 2) if whole.ndim else 0)
            with demanding(f"{name}: read_rows must read some rows; look at by_row"):
                if whole.ndim:
                    demand(
                        torch.equal(tensor.read_rows(half), whole[half]),
                        f"{name}: some of its rows are others than those of the whole tensor",
                    )
            demand(
                b"".join(tensor.chunks()) == bytes(tensor_bytes(whole)),
                f"{name}: its bytes are not those of the tensor that is read",
            )

    def test_a_folder_that_lacks_a_tensor_is_no_bug(
        self, written: tuple[Checkpoint, Mapping[str, Tensor]]
    ) -> None:
        stored, floats = written
        for lost in stored.tensors.keys() - floats.keys():
            left = {name: tensor for name, tensor in stored.tensors.items() if name != lost}
            with demanding(f"{self._who}.as_float must raise QplugError if {lost} is missing"):
                try:
                    self.reader.as_float(stored.config, left)
                except QplugError as error:
                    demand("\n" not in str(error), f"an error must be one line, not {error}")

    @property
    def _who(self) -> str:
        return type(self.reader).__qualname__
