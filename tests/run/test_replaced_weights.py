"""A weight that an algorithm replaces: what is told of it is told against the float one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import qplug
from qplug import Algorithm, Block, NoParams, preset
from qplug.numerics.rounding import nearest
from qplug.testing import registry_with, tiny_block, tiny_linear, write_tiny_model

W8A16 = preset("W8A16").with_group_size(16)


class Halving(Algorithm[NoParams]):
    """Halves every weight: an error of one half that nobody may hide."""

    name = "halving"
    needs_data = True

    def transform(self, block: Block) -> None:
        for linear in block.linears:
            block.replace(linear, linear.weight / 2)


def test_the_float_weight_is_kept_beside_the_new_one() -> None:
    for block in (tiny_linear(W8A16), tiny_block(W8A16)):
        linear = block.linears[0]
        old = linear.weight.clone()
        linear.scale = torch.ones(1)
        block.replace(linear, old / 2)
        block.replace(linear, old / 4)
        assert torch.equal(linear.weight, old / 4)
        assert torch.equal(block.original(linear), old)
        assert linear.scale is None
        with pytest.raises(ValueError, match="but its replacement is"):
            block.replace(linear, old[:1])


def test_scale_that_is_moved_later_moves_both() -> None:
    block = tiny_block(W8A16)
    up = next(linear for linear in block.linears if linear.name.endswith("up"))
    before = block.groups[0]
    wanted = before.sample @ up.weight.T
    block.replace(up, up.weight / 2)
    scale = torch.linspace(0.5, 2, before.sample.shape[1])
    block.smooth(before, scale)
    torch.testing.assert_close(before.sample @ block.original(up).T, wanted)
    torch.testing.assert_close(before.sample @ up.weight.T, wanted / 2)
    rows = torch.linspace(0.5, 2, len(up.weight))
    block.smooth(block.groups[1], rows)
    torch.testing.assert_close(before.sample @ block.original(up).T, wanted / rows)
    torch.testing.assert_close(before.sample @ up.weight.T, wanted / 2 / rows)


def test_inputs_drift_from_those_of_the_float_weight() -> None:
    block = tiny_block(W8A16)
    down = block.groups[1]
    gate = block.groups[0].linears[0]
    block.replace(gate, gate.weight / 2)
    block.use_codes({gate.name: nearest(gate)})
    assert down.drift is not None
    assert down.drift.norm() > 0.05 * down.gram.norm()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", dtype="float32")


def run(model: Path, out: Path, **options: Any) -> qplug.Result:
    sizes: dict[str, Any] = {"scheme": "W8A16", "group_size": 32, "samples": 2, "seq_len": 16}
    data: dict[str, Any] = {"dataset": "kit-text", "registry": registry_with(Halving)}
    return qplug.quantize(str(model), out, algo="halving", device="cpu", **sizes, **data, **options)


def test_a_run_and_verify_tell_the_whole_error(model: Path, tmp_path: Path) -> None:
    result = run(model, tmp_path / "out", backend="compressed-tensors")
    assert all(0.49 < error < 0.51 for error in result.errors.values())
    assert all(0.49 < loss < 0.51 for loss in result.losses.values())
    found = qplug.verify(str(tmp_path / "out"))
    assert found.ok, found.problems
    assert found.rewritten == 0
    assert all(0.49 < error < 0.51 for error in found.errors.values())


def test_a_float_folder_holds_the_new_weight(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "out", backend="hf")
    name = "model.layers.1.mlp.up_proj.weight"
    stored = load_file(tmp_path / "out" / "model.safetensors")[name]
    was = load_file(model / "model.safetensors")[name]
    assert torch.equal(stored, was / 2)
    assert name in (tmp_path / "out" / "qplug.json").read_text()
