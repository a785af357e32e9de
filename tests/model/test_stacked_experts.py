"""Experts that a checkpoint stacks in tensors of three axes are linears of each expert."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from filled_blocks import fill_blocks
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from zoo.make import make

import qplug
from qplug import Stacked
from qplug.checkpoint.open import open_checkpoint
from qplug.checkpoint.stacked import Cut, stack
from qplug.model.architectures import by_linear
from qplug.model.on_disk import as_on_disk
from qplug.model.view import model_view
from qplug.reading.load import load
from qplug.registry.registry import Registry

STACKED = ("gpt_oss", "granitemoe", "llama4", "gemma4_moe", "qwen3_vl_moe_hubfused")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("stacked")
    return {name: make(name, made / name) for name in STACKED}


def _textbook(name: str, whole: Tensor, linear: str) -> Tensor:
    """The weights ``[experts, out, in]`` of ``linear`` in ``gate_up_proj``, by the model's code."""
    transposed = name in ("gpt_oss", "llama4", "qwen3_vl_moe_hubfused")
    rows = whole.transpose(1, 2) if transposed else whole
    if linear == "down_proj":
        return rows
    if name == "gpt_oss":  # gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        return rows[:, ::2] if linear == "gate_proj" else rows[:, 1::2]
    return rows.chunk(2, 1)[linear == "up_proj"]  # gate, up = gate_up.chunk(2)


@pytest.mark.parametrize("name", STACKED)
def test_each_expert_has_its_rows(model: dict[str, Path], name: str) -> None:
    source = open_checkpoint(model[name])
    apart = by_linear(source, Registry.installed())
    stored = load_file(model[name] / "model.safetensors")
    experts = [n for n in apart.tensors if ".experts." in n and n.endswith(".weight")]
    gone = {n: t for n, t in stored.items() if n not in apart.tensors}
    assert len(experts) % 3 == 0
    assert experts
    assert all(t.ndim == 3 for n, t in gone.items() if not n.endswith("_bias"))
    readers, lasts = (
        [n for n in gone if n.removesuffix(".weight").endswith(end)]
        for end in (("gate_up_proj", "input_linear"), ("down_proj", "output_linear"))
    )
    for linear, wholes in (("gate_proj", readers), ("up_proj", readers), ("down_proj", lasts)):
        whole = next(n for n in wholes if ".0." in n or ".1." in n)
        weights = _textbook(name, stored[whole], linear)
        layer = whole.split(".experts.")[0].split(".block_sparse_moe.")[0]
        for number, weight in enumerate(weights):
            (tensor,) = (
                n
                for n in experts
                if n.startswith(layer) and n.endswith(f"{number}.{linear}.weight")
            )
            assert torch.equal(apart.read(tensor), weight)


@pytest.mark.parametrize("name", STACKED)
def test_separate_experts_compute_what_the_module_does(model: dict[str, Path], name: str) -> None:
    whole, apart = load(str(model[name])), load(str(model[name]))
    source = by_linear(open_checkpoint(model[name]), Registry.installed())
    blocks = as_on_disk(apart, model_view(source).blocks, source.tensors)
    assert any(
        ".experts.0." in f"{block}.{local}"
        for block, module in blocks.items()
        for local, _ in module.named_parameters()
    )
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        expected, found = (each(input_ids=tokens).logits for each in (whole, apart))
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("name", [*STACKED, "aria_text"])
def test_experts_that_stay_together_have_the_names_and_axes_of_the_checkpoint(
    tmp_path: Path, name: str
) -> None:
    folder = make(name, tmp_path / name)
    whole, renamed = load(str(folder)), load(str(folder))
    stored = load_file(folder / "model.safetensors")
    source = open_checkpoint(folder)
    view = model_view(by_linear(source, Registry.installed()))
    blocks = as_on_disk(renamed, view.blocks, source.tensors, shapes=source.shapes)
    assert fill_blocks(blocks, stored.__getitem__) >= 2
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        expected, found = (each(input_ids=tokens).logits for each in (whole, renamed))
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("name", ["aria_text", "granitemoe", "qwen3_vl_moe_hubfused"])
def test_experts_may_stay_float_in_a_calibrated_run(tmp_path: Path, name: str) -> None:
    folder, out = make(name, tmp_path / name), tmp_path / "out"
    qplug.quantize(
        str(folder),
        out,
        algo="gptq",
        scheme="W8A16",
        group_size=32,
        backend="fake",
        ignore=("*experts.*",),
        samples=4,
        seq_len=64,
    )
    before, after = (load_file(f / "model.safetensors") for f in (folder, out))
    experts = [tensor for tensor, values in before.items() if values.ndim == 3]
    assert experts
    assert all(torch.equal(before[tensor], after[tensor]) for tensor in experts)
    linear = next(tensor for tensor in before if tensor.endswith("self_attn.q_proj.weight"))
    assert not torch.equal(before[linear], after[linear])


def test_the_layout_is_found_whatever_grouped_products_leave_in_memory(
    model: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def grouped(
        self: nn.Module, tokens: Tensor, chosen: Tensor, shares: Tensor, *_: object
    ) -> Tensor:
        # Rows past the last expert keep what was in their memory, such as the tokens themselves.
        return tokens * shares.sum(-1, keepdim=True)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", grouped)
    source = open_checkpoint(model["gemma4_moe"])
    apart = by_linear(source, Registry.installed())
    assert any(".experts.0." in name for name in apart.tensors)


@pytest.mark.parametrize("name", [n for n in STACKED if n != "gpt_oss"])
def test_a_quantized_folder_has_each_expert(
    model: dict[str, Path], tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    result = qplug.quantize(str(model[name]), out, scheme="W8A16", group_size=32, backend="vllm")
    assert result.float_share < 0.1
    assert qplug.verify(str(out)).ok
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        expected, found = (load(str(f))(input_ids=tokens).logits for f in (model[name], out))
    assert (found - expected).norm() < 0.2 * expected.norm()


def test_experts_that_stay_float_keep_the_published_layout(
    model: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    qplug.quantize(
        str(model["gpt_oss"]),
        out,
        scheme="W8A16",
        group_size=32,
        backend="vllm",
        ignore=("*.experts.*",),
    )
    before, after = (load_file(f / "model.safetensors") for f in (model["gpt_oss"], out))
    experts = [name for name in before if ".experts." in name]
    assert experts
    assert all(torch.equal(before[name], after[name]) for name in experts)
    assert qplug.verify(str(out)).ok


@given(
    count=st.integers(1, 4),
    inner=st.integers(1, 5),
    width=st.integers(1, 5),
    interleaved=st.booleans(),
    linears=st.integers(1, 3),
)
def test_stacking_is_undone_by_cutting(
    count: int, inner: int, width: int, interleaved: bool, linears: int
) -> None:
    names = tuple(tuple(f"{e} {index}" for index in range(linears)) for e in range(count))
    values = {name: torch.randn(inner, width) for of_expert in names for name in of_expert}
    stored = stack(Stacked(names, interleaved), values)
    assert stored.shape == (count, linears * inner, width)
    for expert, of_expert in zip(stored, names, strict=True):
        for index, name in enumerate(of_expert):
            assert torch.equal(Cut(index, linears, interleaved).of(expert), values[name])
