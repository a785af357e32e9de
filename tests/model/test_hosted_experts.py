"""A checkpoint may number the experts of two modules, of unequal size, in one list."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from filled_blocks import fill_blocks
from safetensors.torch import load_file
from torch import Tensor, nn
from zoo.make import make

import qplug
from qplug.checkpoint.open import open_checkpoint
from qplug.model.experts import Experts, expert_of
from qplug.model.on_disk import as_on_disk
from qplug.model.view import model_view
from qplug.reading.load import load

BLOCK = "model.layers.1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("ernie4_5_vl_moe", tmp_path_factory.mktemp("hosted") / "ernie4_5_vl_moe")


def _answer(model: nn.Module) -> Tensor:
    """Every third token is one of a picture, which goes to experts of its own."""
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        output = model.get_submodule("model.language_model")(
            input_ids=tokens, moe_mm_token_type_ids=(tokens % 3 == 0).int()
        )
    answer: Tensor = output.last_hidden_state
    return answer


def test_both_modules_compute_with_the_experts_of_one_list(folder: Path) -> None:
    whole, apart = load(str(folder)), load(str(folder))
    stored, source = load_file(folder / "model.safetensors"), open_checkpoint(folder)
    blocks = as_on_disk(apart, model_view(source).blocks, source.tensors)
    fill_blocks(blocks, stored.__getitem__)
    expected = _answer(whole)
    assert (_answer(apart) - expected).norm() < 1e-5 * expected.norm()
    experts = blocks[BLOCK].get_submodule("mlp.experts")
    assert isinstance(experts, Experts)
    assert len(experts) == 4
    assert expert_of(blocks[BLOCK], "mlp.experts.3.down_proj") == ("mlp.experts", 3)
    assert expert_of(blocks[BLOCK], "mlp.experts.4.down_proj") is None
    sizes = [
        experts.get_submodule(f"{number}.up_proj").get_parameter("weight").shape[0]
        for number in range(8)
    ]
    assert sizes == [512] * 4 + [384] * 4
    with torch.no_grad():
        experts.get_submodule("7.down_proj").get_parameter("weight").mul_(2)
    assert not torch.allclose(_answer(apart), expected)


def test_gptq_takes_experts_of_unequal_size(folder: Path, tmp_path: Path) -> None:
    result = qplug.quantize(
        str(folder),
        tmp_path / "out",
        algo="gptq",
        scheme="W4A16",
        backend="vllm",
        dataset="demo",
        samples=4,
        seq_len=32,
    )
    assert {f"{BLOCK}.mlp.experts.{number}.down_proj" for number in (0, 3, 4, 7)} <= {
        *result.errors
    }
    assert qplug.verify(str(tmp_path / "out")).ok
