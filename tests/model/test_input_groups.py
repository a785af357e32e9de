"""What a block is made of is found, and scale moved within it changes nothing that it computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qplug import InputGroup
from qplug.calibration.live_block import LiveBlock
from qplug.calibration.walk import Walk
from qplug.checkpoint.open import open_checkpoint
from qplug.model.input_groups import GroupPaths, find_groups
from qplug.model.view import model_view

Family = Callable[..., Path]
StartWalk = Callable[..., Walk]
MakeTokens = Callable[..., Tensor]

pytestmark = pytest.mark.usefixtures("passes_in_float32")

#: What float32 may lose, relative to what the block adds to the residual stream.
RTOL = 1e-5

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")

Expected = dict[tuple[str, ...], tuple[str, str] | None]

LLAMA: Expected = {
    QKV: ("norm", "input_layernorm"),
    ("self_attn.o_proj",): ("rows", "self_attn.v_proj"),
    GATE_UP: ("norm", "post_attention_layernorm"),
    ("mlp.down_proj",): ("rows", "mlp.up_proj"),
}
GEMMA: Expected = {
    QKV: ("offset-norm", "input_layernorm"),
    ("self_attn.o_proj",): ("rows", "self_attn.v_proj"),
    GATE_UP: ("offset-norm", "pre_feedforward_layernorm"),
    ("mlp.down_proj",): ("rows", "mlp.up_proj"),
}
OPT: Expected = {
    QKV: ("norm", "self_attn_layer_norm"),
    ("self_attn.out_proj",): ("rows", "self_attn.v_proj"),
    ("fc1",): ("norm", "final_layer_norm"),
    ("fc2",): ("rows", "fc1"),  # relu(x / s) = relu(x) / s
}
NEOX: Expected = {
    ("attention.query_key_value",): ("norm", "input_layernorm"),
    ("attention.dense",): ("rows", "attention.query_key_value"),
    ("mlp.dense_h_to_4h",): ("norm", "post_attention_layernorm"),
    ("mlp.dense_4h_to_h",): None,  # nothing goes through gelu
}
#: The groups of each family, in the order in which it computes, and what is before each.
EXPECTED: dict[str, Expected] = {
    "llama": LLAMA,
    "llama, biases": LLAMA,
    "llama, one kv head": LLAMA,
    "llama, all kv heads": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "phi3": {
        ("self_attn.qkv_proj",): ("norm", "input_layernorm"),
        ("self_attn.o_proj",): ("rows", "self_attn.qkv_proj"),
        ("mlp.gate_up_proj",): ("norm", "post_attention_layernorm"),
        ("mlp.down_proj",): ("rows", "mlp.gate_up_proj"),
    },
    "opt": OPT,
    "opt, gelu": {**OPT, ("fc2",): None},
    "opt, squared": OPT,  # the rows of fc1 take the root of the scale
    # The residual stream is what these norms make, so that they cannot be divided.
    "opt, norm after": {**OPT, QKV: None, ("fc1",): None},
    "gpt-neox": NEOX,
    "gpt-neox, in sequence": NEOX,
    "phi": {  # attention and MLP side by side, behind one norm
        (*QKV, "mlp.fc1"): ("norm", "input_layernorm"),
        ("self_attn.dense",): ("rows", "self_attn.v_proj"),
        ("mlp.fc2",): None,
    },
}
#: Families with biases in norms and in the linears behind them.
SHIFTABLE: dict[str, set[tuple[str, ...]]] = {
    "opt": {QKV, ("fc1",)},
    "opt, gelu": {QKV, ("fc1",)},
    "opt, squared": {QKV, ("fc1",)},
    "gpt-neox": {("attention.query_key_value",), ("mlp.dense_h_to_4h",)},
    "gpt-neox, in sequence": {("attention.query_key_value",), ("mlp.dense_h_to_4h",)},
    "phi": {(*QKV, "mlp.fc1")},
}
every_family = pytest.mark.parametrize("name", EXPECTED)


# --- the model that transformers has, with the block's parameters ---------------------------------


def reference(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def put(model: nn.Module, name: str, values: Mapping[str, Tensor]) -> None:
    """Give block ``name`` the parameters ``values``, in float32."""
    copies = {local: value.float().clone() for local, value in values.items()}
    model.get_submodule(name).load_state_dict(copies, strict=True)


@torch.no_grad()
def calls_of(model: PreTrainedModel, blocks: tuple[str, ...], tokens: Tensor) -> dict[str, Any]:
    """What each block is called with, and what it gives."""
    seen: dict[str, Any] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, kwargs, output, name=name: seen.update(
                {name: (args, kwargs, output if isinstance(output, Tensor) else output[0])}
            ),
            with_kwargs=True,
        )
        for name in blocks
    ]
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def again(block: nn.Module, call: Any, watch: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """The block's output for ``call``, and the inputs of the linears in ``watch``, as rows."""
    inputs: dict[str, Tensor] = {}
    handles = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: inputs.update({name: args[0].flatten(0, -2)})
        )
        for name in watch
    ]
    args, kwargs, _ = call
    output = block(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return output if isinstance(output, Tensor) else output[0], inputs


def distance(found: Tensor, wanted: Tensor) -> float:
    off, norm = (found.double() - wanted.double()).norm(), wanted.double().norm()
    return float(off / norm) if norm else float(off)


def check_output(model: PreTrainedModel, name: str, call: Any) -> None:
    """Beside what comes in and goes straight on, the block adds what it always did."""
    args, _, wanted = call
    found, _ = again(model.get_submodule(name), call, [])
    incoming = args[0]
    assert distance(found - incoming, wanted - incoming) <= RTOL


def check_statistics(model: PreTrainedModel, block: LiveBlock, call: Any) -> None:
    """What each group says of its input is what it is."""
    firsts = [group.linears[0].name.removeprefix(f"{block.name}.") for group in block.groups]
    _, inputs = again(model.get_submodule(block.name), call, firsts)
    for group, first in zip(block.groups, firsts, strict=True):
        x = inputs[first].double()
        assert group.tokens == len(x)
        assert distance(group.gram, x.T @ x) <= RTOL
        assert distance(group.mean_abs, x.abs().mean(0)) <= RTOL
        assert (group.mean - x.mean(0)).norm() <= RTOL * x.abs().mean(0).norm()
        assert distance(group.low, x.amin(0)) <= RTOL
        assert distance(group.high, x.amax(0)) <= RTOL
        assert distance(group.sample, x) <= RTOL  # few tokens: all of them


def random_scale(block: LiveBlock, group: InputGroup, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return block.shared(group, torch.randn(len(group.gram), generator=generator).exp())


def local_names(block: LiveBlock, group: InputGroup) -> tuple[str, ...]:
    return tuple(linear.name.removeprefix(f"{block.name}.") for linear in group.linears)


# --- what is found -------------------------------------------------------------------------------


@every_family
def test_groups_are_found(
    name: str,
    family: Family,
    start_walk: StartWalk,
    make_tokens: MakeTokens,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[tuple[GroupPaths, ...]] = []

    def find(block: nn.Module, call: Any) -> tuple[GroupPaths, ...]:
        found.append(find_groups(block, call))
        return found[-1]

    monkeypatch.setattr("qplug.calibration.block_structures.find_groups", find)
    source = family(name)
    view = model_view(open_checkpoint(source))
    walk = start_walk(source, make_tokens(3, 20))
    for block_name in view.blocks:
        block = walk.gather(block_name)
        assert [(local_names(block, g), g.scalable) for g in block.groups] == [
            (linears, before is not None) for linears, before in EXPECTED[name].items()
        ]
        for group in block.groups:
            before = EXPECTED[name][local_names(block, group)]
            assert group.after_norm == (before is not None and before[0] != "rows")
        assert {linear.name for linear in block.linears} == {
            linear for linear in view.quantizable if linear.startswith(f"{block_name}.")
        }
        walk.advance(block_name, {})
    (groups,) = found  # all blocks are alike
    assert {
        group.linears: group.producer and (group.producer.kind, group.producer.module)
        for group in groups
    } == EXPECTED[name]


@pytest.mark.parametrize("length", [1, 2])
@every_family
def test_groups_are_found_on_a_token_or_two(
    name: str, length: int, family: Family, start_walk: StartWalk, make_tokens: MakeTokens
) -> None:
    walk = start_walk(family(name), make_tokens(1, length))
    block = walk.gather(walk._view.blocks[0])
    assert [(local_names(block, g), g.scalable) for g in block.groups] == [
        (linears, before is not None) for linears, before in EXPECTED[name].items()
    ]


# --- what is computed ----------------------------------------------------------------------------


@every_family
def test_smoothing_changes_nothing_that_is_computed(
    name: str, family: Family, start_walk: StartWalk, make_tokens: MakeTokens
) -> None:
    tokens = make_tokens(3, 20)
    model = reference(family(name))
    with torch.no_grad():
        logits = model(tokens).logits
    walk = start_walk(family(name), tokens)
    calls = calls_of(model, walk._view.blocks, tokens)
    for seed, block_name in enumerate(calls):
        block = walk.gather(block_name)
        check_statistics(model, block, calls[block_name])
        old = {local: master.clone() for local, master in block.weights32.items()}
        rewritten: set[str] = set()
        for number, group in enumerate(block.groups):
            if not group.scalable:
                continue
            scale = random_scale(block, group, 10 * seed + number)
            before = EXPECTED[name][local_names(block, group)]
            assert before is not None
            columns = [linear.weight.clone() for linear in group.linears]
            block.smooth(group, scale)
            for weight, linear in zip(columns, group.linears, strict=True):
                torch.testing.assert_close(linear.weight, weight * scale)
            rewritten |= {f"{linear}.weight" for linear in local_names(block, group)}
            rewritten |= {f"{before[1]}.weight", f"{before[1]}.bias"} & set(old)
        # What is said to be rewritten is, and the rest is not.
        assert set(block.rewritten()) == {f"{block_name}.{local}" for local in rewritten}
        for local, value in old.items():
            assert torch.equal(value, block.weights32[local]) == (local not in rewritten)
        put(model, block_name, block.weights32)
        check_output(model, block_name, calls[block_name])
        check_statistics(model, block, calls[block_name])
        walk.advance(block_name, {})
    with torch.no_grad():
        assert distance(model(tokens).logits, logits) <= RTOL


@every_family
def test_shifting_changes_nothing_that_is_computed(
    name: str, family: Family, start_walk: StartWalk, make_tokens: MakeTokens
) -> None:
    tokens = make_tokens(3, 20)
    model = reference(family(name))
    walk = start_walk(family(name), tokens)
    calls = calls_of(model, walk._view.blocks, tokens)
    block_name = next(iter(calls))
    block = walk.gather(block_name)
    shiftable = {local_names(block, group) for group in block.groups if group.shiftable}
    assert shiftable == SHIFTABLE.get(name, set())
    generator = torch.Generator().manual_seed(0)
    for number, group in enumerate(block.groups):
        offset = torch.randn(len(group.gram), generator=generator)
        if not group.shiftable:
            with pytest.raises(ValueError, match="offset"):
                block.shift(group, offset)
            continue
        low = group.low.clone()
        block.shift(group, offset)
        torch.testing.assert_close(group.low, low - offset)
        block.smooth(group, random_scale(block, group, number))
        block.shift(group, -offset)
    put(model, block_name, block.weights32)
    check_output(model, block_name, calls[block_name])
    check_statistics(model, block, calls[block_name])


def test_what_cannot_be_scaled_says_so(
    family: Family, start_walk: StartWalk, make_tokens: MakeTokens
) -> None:
    walk = start_walk(family("gpt-neox"), make_tokens(1, 8))
    block = walk.gather("gpt_neox.layers.0")
    *_, last = block.groups
    with pytest.raises(ValueError, match="no operation before this group can take a scale"):
        block.smooth(last, torch.ones(96))
    with pytest.raises(ValueError, match="no operation before this group can take a scale"):
        block.shared(last, torch.ones(96))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_is_none_is_refused_before_anything_changes(
    bad: float, family: Family, start_walk: StartWalk, make_tokens: MakeTokens
) -> None:
    block = start_walk(family("llama"), make_tokens(1, 8)).gather("model.layers.0")
    old = {local: master.clone() for local, master in block.weights32.items()}
    for group in block.groups:
        scale = torch.ones(len(group.gram))
        scale[3] = bad
        with pytest.raises(ValueError, match="positive and finite"):
            block.smooth(group, scale)
    assert all(torch.equal(value, block.weights32[local]) for local, value in old.items())
    assert block.rewritten() == ()


# --- channels that are scaled together -----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kv_heads", "head"),
    [("llama", 2, 24), ("llama, one kv head", 1, 24), ("qwen2", 2, 16), ("phi3", 2, 16)],
)
def test_heads_that_share_values_share_scales(
    name: str,
    kv_heads: int,
    head: int,
    family: Family,
    start_walk: StartWalk,
    make_tokens: MakeTokens,
) -> None:
    block = start_walk(family(name), make_tokens(1, 8)).gather("model.layers.0")
    group = block.groups[1]
    given = torch.rand(4 * head, generator=torch.Generator().manual_seed(0)) + 0.5
    # Query heads of one key-value head are neighbours.
    means = given.view(kv_heads, 4 // kv_heads, head).mean(1, keepdim=True)
    wanted = means.expand(-1, 4 // kv_heads, -1).flatten()
    torch.testing.assert_close(block.shared(group, given), wanted)
    rows = block.weights32[
        "self_attn.v_proj.weight" if name != "phi3" else "self_attn.qkv_proj.weight"
    ]
    old = rows.clone()
    block.smooth(group, given)  # averaged on the way
    divided = old.clone()
    divided[-kv_heads * head :] /= means.flatten()[:, None]
    torch.testing.assert_close(rows, divided)


def test_channels_of_a_norm_are_scaled_one_by_one(
    family: Family, start_walk: StartWalk, make_tokens: MakeTokens
) -> None:
    block = start_walk(family("llama"), make_tokens(1, 8)).gather("model.layers.0")
    given = torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.5
    assert torch.equal(block.shared(block.groups[0], given), given)


# --- what stays float, and what is stored in half precision --------------------------------------


@pytest.mark.parametrize(
    "ignore",
    [
        ["k_proj"],  # reads what is divided, and stays float
        ["v_proj", "up_proj"],  # are divided, and stay float
        ["q_proj", "o_proj", "gate_proj", "down_proj"],
        ["q_proj", "k_proj", "v_proj"],  # nothing is left of a group
    ],
)
def test_linears_that_stay_float_take_part(
    ignore: list[str], family: Family, start_walk: StartWalk, make_tokens: MakeTokens
) -> None:
    tokens = make_tokens(3, 20)
    model = reference(family("llama"))
    walk = start_walk(family("llama"), tokens, ignore=ignore)
    calls = calls_of(model, walk._view.blocks, tokens)
    block = walk.gather("model.layers.0")
    assert not [linear for linear in block.linears if linear.name.endswith(tuple(ignore))]
    for number, group in enumerate(block.groups):
        assert group.linears
        block.smooth(group, random_scale(block, group, number))
    put(model, block.name, block.weights32)
    check_output(model, block.name, calls[block.name])
    # They are stored as they were rewritten, and said to be.
    for linear in ("k_proj", "v_proj"):
        name = f"{block.name}.self_attn.{linear}.weight"
        if linear in ignore and len(block.groups) == 4:
            assert name in block.rewritten()
        (stored,) = block.stored_floats([name]).values()
        assert torch.equal(stored, block.weights32[f"self_attn.{linear}.weight"])


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("said", ["the same", "float32"])
def test_norms_can_be_stored_and_still_nothing_changes(
    name: str,
    dtype: torch.dtype,
    said: str,
    tmp_path: Path,
    family: Family,
    start_walk: StartWalk,
    make_tokens: MakeTokens,
) -> None:
    """What rounding takes from a norm goes into the columns behind it."""
    tokens = make_tokens(3, 20)
    folder = family(name, dtype)
    if said == "float32":  # config.json may have another dtype than the tensors
        folder = Path(shutil.copytree(folder, tmp_path / "model"))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "dtype": said}))
    model = reference(folder)
    walk = start_walk(folder, tokens)
    calls = calls_of(model, walk._view.blocks, tokens)
    block = walk.gather("model.layers.0")
    for number, group in enumerate(block.groups):
        block.smooth(group, random_scale(block, group, number))
    norms = [local for local, value in block.weights32.items() if value.ndim == 1]
    stored = block.stored_floats([f"{block.name}.{local}" for local in norms])
    for local in norms:
        kept = stored[f"{block.name}.{local}"]
        assert kept.dtype == dtype
        assert torch.equal(kept.float(), block.weights32[local])
    put(model, block.name, block.weights32)
    check_output(model, block.name, calls[block.name])
    check_statistics(model, block, calls[block.name])


def edited(
    folder: Path, source: Path, edit: Callable[[PreTrainedModel], None], dtype: torch.dtype
) -> Path:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    with torch.no_grad():
        edit(model)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_norm_is_never_rounded_to_nothing(
    name: str, tmp_path: Path, family: Family, start_walk: StartWalk, make_tokens: MakeTokens
) -> None:
    """A weight near -1 of Gemma's norms has few bits left beside the one that is added."""

    def edit(model: PreTrainedModel) -> None:
        offset = 1.0 if name == "gemma2" else 0.0
        for layer in model.model.layers:
            layer.input_layernorm.weight[::3] = 0.01 - offset
            layer.input_layernorm.weight[1::3] = -0.01 - offset
            layer.input_layernorm.weight[5] = -offset  # nothing from the start

    tokens = make_tokens(3, 20)
    folder = edited(tmp_path / "model", family(name), edit, torch.bfloat16)
    model = reference(folder)
    walk = start_walk(folder, tokens)
    calls = calls_of(model, walk._view.blocks, tokens)
    block = walk.gather("model.layers.0")
    block.smooth(block.groups[0], torch.full((64,), 100.0))
    put(model, block.name, block.weights32)
    check_output(model, block.name, calls[block.name])
    check_statistics(model, block, calls[block.name])


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize("zero", ["o_proj", "down_proj", "up_proj", "v_proj", "norm", "all"])
def test_a_first_block_that_does_nothing(
    zero: str,
    name: str,
    tmp_path: Path,
    family: Family,
    start_walk: StartWalk,
    make_tokens: MakeTokens,
) -> None:
    """Grown models have blocks that begin as zero: the structure of all is found all the same."""

    def edit(model: PreTrainedModel) -> None:
        for local, parameter in model.model.layers[0].named_parameters():
            if (
                zero in local
                or zero == "all"
                or (zero in ("up_proj", "v_proj") and "_up_" in local)
            ):
                parameter.zero_()

    tokens = make_tokens(3, 20)
    folder = edited(tmp_path / "model", family(name), edit, torch.float32)
    model = reference(folder)
    walk = start_walk(folder, tokens)
    calls = calls_of(model, walk._view.blocks, tokens)
    for block_name in ("model.layers.0", "model.layers.1"):
        block = walk.gather(block_name)
        assert all(group.scalable for group in block.groups)
        for number, group in enumerate(block.groups):
            block.smooth(group, random_scale(block, group, number))
        put(model, block_name, block.weights32)
        walk.advance(block_name, {})
    check_output(model, "model.layers.1", calls["model.layers.1"])
    found, _ = again(model.get_submodule("model.layers.0"), calls["model.layers.0"], [])
    assert distance(found, calls["model.layers.0"][2]) <= RTOL


def test_a_block_that_is_small_beside_the_residual(
    tmp_path: Path, family: Family, start_walk: StartWalk, make_tokens: MakeTokens
) -> None:
    """Late blocks of large models add little to a stream of huge values."""

    def edit(model: PreTrainedModel) -> None:
        model.model.embed_tokens.weight.mul_(1e4)

    folder = edited(tmp_path / "model", family("llama"), edit, torch.float32)
    block = start_walk(folder, make_tokens(3, 20)).gather("model.layers.0")
    assert [group.scalable for group in block.groups] == [True] * 4


def test_probing_leaves_the_block_as_it_was(family: Family, make_tokens: MakeTokens) -> None:
    model = reference(family("opt"))
    tokens = make_tokens(2, 8)
    calls = calls_of(model, ("model.decoder.layers.0",), tokens)
    block = model.model.decoder.layers[0]
    old = {local: value.clone() for local, value in block.state_dict().items()}
    args, kwargs, _ = calls["model.decoder.layers.0"]
    with torch.no_grad():
        find_groups(block, lambda: block(*args, **kwargs))
    assert all(torch.equal(value, old[local]) for local, value in block.state_dict().items())
    assert not any(module._forward_pre_hooks for module in block.modules())
    assert not any(module._forward_hooks for module in block.modules())


# --- choices that a later step undoes -------------------------------------------------------------


def test_smoothing_forgets_scales_that_no_longer_fit(
    family: Family, start_walk: StartWalk, make_tokens: MakeTokens
) -> None:
    """Of the linears whose columns grow, and of the one whose rows shrink."""
    block = start_walk(family("llama"), make_tokens(1, 8)).gather("model.layers.0")
    for linear in block.linears:
        linear.scale = torch.ones(linear.args.scale_shape(tuple(linear.weight.shape)))
    block.smooth(block.groups[1], torch.full((96,), 2.0))
    forgotten = {linear.name for linear in block.linears if linear.scale is None}
    assert forgotten == {f"{block.name}.self_attn.{name}" for name in ("o_proj", "v_proj")}
