"""qplug's own readers keep the contract of readers; a reader that does not is told so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import foreign_folders as foreign
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qplug import StoredTensor, TensorSpec, open_checkpoint
from qplug.testing import ReaderContract
from qplug_readers.awq import AWQReader
from qplug_readers.fp8 import FP8Reader
from qplug_readers.gptq import GPTQReader


def save(folder: Path, told: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    config = {"dtype": "bfloat16", "quantization_config": told}
    (folder / "config.json").write_text(json.dumps(config))


def integers() -> tuple[Tensor, Tensor]:
    """A weight, and the weight that its codes stand for."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    codes, zero, scale = foreign.grid(weight, sym=False)
    spread = codes.view(16, 2, foreign.SIZE) - zero[..., None]
    return weight, (spread * scale.float()[..., None]).view(16, 64).bfloat16()


class TestAWQ(ReaderContract):
    reader = AWQReader()

    def write(self, folder: Path) -> Mapping[str, Tensor]:
        weight, floats = integers()
        told = {"quant_method": "awq", "bits": 4, "version": "gemm"}
        save(folder, told, {f"q.{local}": part for local, part in foreign.awq(weight).items()})
        return {"q.weight": floats}


class TestGPTQ(ReaderContract):
    reader = GPTQReader()

    def write(self, folder: Path) -> Mapping[str, Tensor]:
        weight, floats = integers()
        told = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
        stored = foreign.gptq(weight, sym=False)
        save(folder, told, {f"q.{local}": part for local, part in stored.items()})
        return {"q.weight": floats}


class TestFP8(ReaderContract):
    reader = FP8Reader()

    def write(self, folder: Path) -> Mapping[str, Tensor]:
        stored = foreign.block_fp8(torch.randn(64, 128))
        save(
            folder,
            {"quant_method": "fp8", "weight_block_size": [64, 128]},
            {"norm.weight": torch.ones(4), **{f"q.{n}": part for n, part in stored.items()}},
        )
        floats = stored["weight"].float() * stored["weight_scale_inv"]
        return {"q.weight": floats.bfloat16(), "norm.weight": torch.ones(4)}


class Wrong(AWQReader):
    """Returns what the test says."""

    def __init__(self, answer: dict[str, StoredTensor]) -> None:
        self._answer = answer

    def as_float(self, config: Mapping[str, Any], *_: object) -> Any:
        return self.without_quantization(config), self._answer


class Zeros(StoredTensor):
    """A tensor of zeros."""

    spec = TensorSpec("bfloat16", (16, 64))

    @property
    def paths(self) -> tuple[Path, ...]:
        return ()

    def read(self) -> Tensor:
        return torch.zeros(self.spec.shape, dtype=torch.bfloat16)

    def chunks(self) -> Any:
        return iter([b"0"])


@pytest.mark.parametrize(
    ("answer", "says"),
    [({}, r"gives \[\], not \['q.weight'\]"), ({"q.weight": Zeros()}, "read as another tensor")],
)
def test_a_wrong_answer_trips(answer: dict[str, StoredTensor], says: str, tmp_path: Path) -> None:
    contract = TestAWQ()
    floats = contract.write(tmp_path)
    contract.reader = Wrong(answer)  # type: ignore[assignment]
    with pytest.raises(AssertionError, match=says):
        contract.test_tensors_are_those_of_the_float_model((open_checkpoint(tmp_path), floats))


def test_bytes_of_another_tensor_trip(tmp_path: Path) -> None:
    contract = TestAWQ()
    floats = contract.write(tmp_path)
    contract.reader = Wrong({"q.weight": Zeros()})  # type: ignore[assignment]
    with pytest.raises(AssertionError, match="its bytes are not those"):
        contract.test_rows_and_bytes_are_those_of_the_whole((open_checkpoint(tmp_path), floats))
