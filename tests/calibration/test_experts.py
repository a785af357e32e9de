"""Experts in a calibrated run: told apart, known by their own tokens, scaled with their layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear as multiply
from transformers import AutoModelForCausalLM, PreTrainedModel

import qplug
from qplug import QplugError, QuantArgs, Scheme
from qplug.api.groups import dequantize
from qplug.calibration.live_block import LiveBlock
from qplug.calibration.samples import Samples
from qplug.calibration.walk import Walk
from qplug.checkpoint.open import open_checkpoint
from qplug.machine.session import Session
from qplug.model.experts import Experts
from qplug.model.on_disk import as_on_disk
from qplug.model.view import model_view
from qplug.numerics.rounding import round_to_nearest
from qplug.output.manifest import read_manifest

Family = Callable[..., Path]
StartWalk = Callable[..., Walk]
MakeTokens = Callable[..., Tensor]

MIXTURES = ("qwen3-moe", "qwen2-moe", "mixtral", "deepseek-v3")
#: Windows, tokens in each and windows in a batch: one token, which two of the four experts get.
ONE = (1, 1, 1)
every_mixture = pytest.mark.parametrize("name", MIXTURES)
#: The names on disk: the experts of a block, an expert's linears, and what else reads the norm.
NAMES: dict[str, tuple[str, tuple[str, str, str], tuple[str, ...]]] = {
    "qwen3-moe": ("mlp.experts", ("gate_proj", "up_proj", "down_proj"), ("mlp.gate",)),
    "qwen2-moe": (
        "mlp.experts",
        ("gate_proj", "up_proj", "down_proj"),
        (
            *("mlp.gate", "mlp.shared_expert_gate"),
            *("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
        ),
    ),
    "mixtral": ("block_sparse_moe.experts", ("w1", "w3", "w2"), ("block_sparse_moe.gate",)),
    "deepseek-v3": (
        "mlp.experts",
        ("gate_proj", "up_proj", "down_proj"),
        ("mlp.gate", "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    ),
}
#: The block with experts that tests look at. Of Qwen3 every second has them, of DeepSeek not the
#: first.
BLOCK = "model.layers.1"
RTOL = 1e-5


pytestmark = pytest.mark.usefixtures("passes_in_float32")


def reference(folder: Path) -> PreTrainedModel:
    """The model of transformers, in float32, with the names that tensors have on disk."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    source = open_checkpoint(folder)
    as_on_disk(model, model_view(source).blocks, source.tensors)
    return model.eval()


def distance(found: Tensor, wanted: Tensor) -> float:
    off, norm = (found.double() - wanted.double()).norm(), wanted.double().norm()
    return float(off / norm) if norm else float(off)


@torch.no_grad()
def routed(folder: Path, tokens: Tensor, block: str = BLOCK) -> tuple[Tensor, Tensor]:
    """What the fused experts of ``block`` are given by transformers: tokens, and who they go to."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: list[tuple[Tensor, ...]] = []
    fused = next(
        module
        for name, module in model.named_modules()
        if name.startswith(f"{block}.") and name.endswith(".experts")
    )
    handle = fused.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    model.eval()(tokens, use_cache=False)
    handle.remove()
    ((x, chosen, _),) = seen
    return x, chosen


def rows_of_experts(
    folder: Path, tokens: Tensor, name: str
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """What all, what each expert, and what its last linear reads, from the tensors on disk."""
    x, chosen = routed(folder, tokens)
    path, (gate, up, _), _ = NAMES[name]
    held = load_file(folder / "model.safetensors")
    inputs, between = [], []
    for expert in range(4):
        rows = x[(chosen == expert).any(-1)]
        first, second = (
            multiply(rows, held[f"{BLOCK}.{path}.{expert}.{local}.weight"].float())
            for local in (gate, up)
        )
        inputs.append(rows)
        between.append(nn.functional.silu(first) * second)
    return x, inputs, between


def check_known(group: qplug.InputGroup, x: Tensor) -> None:
    assert group.tokens == len(x)
    x = x.double()
    assert distance(group.gram, x.T @ x) <= RTOL
    if not len(x):  # no token reached it
        assert not group.low.any()
        assert not group.high.any()
        return
    assert distance(group.mean_abs, x.abs().mean(0)) <= RTOL
    assert distance(group.low, x.amin(0)) <= RTOL
    assert distance(group.high, x.amax(0)) <= RTOL


def experts_group(block: LiveBlock) -> qplug.InputGroup:
    (group,) = (group for group in block.groups if group.by_expert)
    return group


def last_groups(block: LiveBlock) -> list[qplug.InputGroup]:
    return [group for group in block.groups if group.experts is not None]


# --- as they are on disk --------------------------------------------------------------------------


@every_mixture
def test_experts_one_by_one_compute_what_fused_ones_do(
    name: str, family: Family, make_tokens: MakeTokens
) -> None:
    tokens = make_tokens(2, 20)
    with torch.no_grad():
        fused = AutoModelForCausalLM.from_pretrained(family(name), dtype=torch.float32).eval()
        wanted = fused(tokens).logits
        model = reference(family(name))
        assert distance(model(tokens).logits, wanted) <= 1e-6
    assert any(isinstance(module, Experts) for module in model.modules())
    parameters = {local for local, _ in model.named_parameters()}
    buffers = {n for n in load_file(family(name) / "model.safetensors") if n not in parameters}
    assert parameters <= set(load_file(family(name) / "model.safetensors"))
    assert all(name.endswith("e_score_correction_bias") for name in buffers)


def test_experts_that_compute_otherwise_are_refused_in_words(
    family: Family, start_walk: StartWalk, make_tokens: MakeTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x, *args: x + forward(self, x, *args))
    with pytest.raises(QplugError, match=r"^model\.layers\.1\.mlp\.experts: is stored in parts"):
        start_walk(family("qwen3-moe"), make_tokens(1, 8))


# --- what is known of them ------------------------------------------------------------------------


@pytest.mark.parametrize(("windows", "length", "batch"), [*((5, 12, n) for n in (1, 2, 5)), ONE])
@every_mixture
def test_an_expert_is_known_by_its_own_tokens(
    name: str,
    windows: int,
    length: int,
    batch: int,
    family: Family,
    start_walk: StartWalk,
    make_tokens: MakeTokens,
) -> None:
    tokens = make_tokens(windows, length)
    x, inputs, between = rows_of_experts(family(name), tokens, name)
    assert any(len(own) == 0 for own in inputs) == ((windows, length, batch) == ONE)
    walk = start_walk(family(name), tokens, batch_size=batch)
    walk.gather("model.layers.0")
    walk.advance("model.layers.0", {})
    block = walk.gather(BLOCK)
    path, locals_, others = NAMES[name]
    group = experts_group(block)
    check_known(group, x)
    assert (group.scalable, group.after_norm) == (True, True)
    quantized = [
        n for n in others if not n.endswith(("mlp.gate", "moe.gate", "shared_expert_gate"))
    ]
    wanted = {f"{BLOCK}.{n}" for n in quantized}
    for number, (part, own) in enumerate(zip(group.by_expert, inputs, strict=True)):
        names = [f"{BLOCK}.{path}.{number}.{local}" for local in locals_[:2]]
        assert [linear.name for linear in part.linears] == names
        assert not part.scalable
        wanted.update(names)
        check_known(part, own)
    assert {linear.name for linear in group.linears} == wanted
    assert [len(part.linears) for part in group.by_tokens] == [len(quantized)] * bool(quantized) + [
        2
    ] * 4
    lasts = last_groups(block)
    assert [group.linears[0].name for group in lasts] == [
        f"{BLOCK}.{path}.{number}.{locals_[2]}" for number in range(4)
    ]
    assert {group.experts for group in lasts} == {f"{BLOCK}.{path}"}
    for last, made in zip(lasts, between, strict=True):
        check_known(last, made)
        assert last.scalable == (len(made) > 0)
    with pytest.raises(ValueError, match="no operation before this group"):
        block.smooth(group.by_expert[0], torch.ones(64))


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe"])
def test_all_experts_see_all_tokens_and_the_layer_gives_the_same(
    name: str, family: Family, start_walk: StartWalk, make_tokens: MakeTokens
) -> None:
    tokens = make_tokens(3, 12)
    tokens[1, 9:] = -1
    routed, every = (
        start_walk(family(name), tokens, with_targets=True, all_experts=each)
        for each in (False, True)
    )
    for block_name in ("model.layers.0", BLOCK):
        blocks = [walk.gather(block_name) for walk in (routed, every)]
        outputs = [
            torch.cat([batch.target for batch in block.reconstruction.batches()])
            for block in blocks
            if block.reconstruction is not None
        ]
        assert distance(*outputs) <= RTOL
        for group in (*experts_group(blocks[1]).by_expert, *last_groups(blocks[1])):
            assert group.tokens == 33
        few = {group.tokens for group in experts_group(blocks[0]).by_expert}
        assert max(few) < 33
        for walk in (routed, every):
            walk.advance(block_name, {})


def test_padding_is_no_token_of_an_expert(
    family: Family, start_walk: StartWalk, make_tokens: MakeTokens
) -> None:
    tokens = make_tokens(3, 14)
    lengths = [14, 5, 1]
    each = [
        rows_of_experts(family("mixtral"), tokens[i : i + 1, :length], "mixtral")
        for i, length in enumerate(lengths)
    ]
    for i, length in enumerate(lengths):
        tokens[i, length:] = -1
    walk = start_walk(family("mixtral"), tokens)
    walk.gather("model.layers.0")
    walk.advance("model.layers.0", {})
    block = walk.gather(BLOCK)
    for number, (part, last) in enumerate(
        zip(experts_group(block).by_expert, last_groups(block), strict=True)
    ):
        check_known(part, torch.cat([inputs[number] for _, inputs, _ in each]))
        check_known(last, torch.cat([between[number] for _, _, between in each]))


def test_the_extremes_of_an_expert_are_those_of_its_windows(
    family: Family, start_walk: StartWalk, make_tokens: MakeTokens
) -> None:
    """However many windows there are in a batch; windows without a token of its own are none."""
    tokens = make_tokens(6, 5)
    static = Scheme("", QuantArgs("int8", "channel"), QuantArgs("int8", "tensor", dynamic=False))
    found = []
    for batch in (1, 4):
        walk = start_walk(family("mixtral"), tokens, scheme=static, batch_size=batch)
        block = walk.gather("model.layers.0")
        groups = (*experts_group(block).by_expert, *last_groups(block))
        found.append([(group.lows, group.highs) for group in groups])
    for one, four in zip(*found, strict=True):
        torch.testing.assert_close(one, four, rtol=1e-4, atol=1e-5)


# --- what is moved --------------------------------------------------------------------------------


@every_mixture
def test_smoothing_changes_nothing_that_is_computed(
    name: str, family: Family, start_walk: StartWalk, make_tokens: MakeTokens
) -> None:
    """Routers and shared experts read what is divided, and take their part of it."""
    tokens = make_tokens(4, 16)
    model = reference(family(name))
    with torch.no_grad():
        wanted = model(tokens).logits
    walk = start_walk(family(name), tokens)
    path, locals_, others = NAMES[name]
    for block_name in walk._view.blocks:
        block = walk.gather(block_name)
        old = {local: master.clone() for local, master in block.weights32.items()}
        for number, group in enumerate(block.groups):
            assert group.scalable == (group.tokens > 0)
            if group.scalable:
                generator = torch.Generator().manual_seed(number)
                scale = torch.randn(len(group.gram), generator=generator).exp()
                block.smooth(group, block.shared(group, scale))
        values = {local: value.clone() for local, value in block.weights32.items()}
        model.get_submodule(block_name).load_state_dict(values, strict=True)
        if block_name == BLOCK:
            scale = block.weights32["post_attention_layernorm.weight"]
            scale = old["post_attention_layernorm.weight"] / scale
            for other in (n for n in others if not n.endswith("up_proj")):  # whose rows move too
                moved = old[f"{other}.weight"] * scale
                torch.testing.assert_close(block.weights32[f"{other}.weight"], moved)
            assert f"{BLOCK}.{others[0]}.weight" in block.rewritten()
            _, inputs, between = rows_of_experts(family(name), tokens, name)
            for part, own in zip(experts_group(block).by_expert, inputs, strict=True):
                check_known(part, own / scale)
            for number, (last, made) in enumerate(zip(last_groups(block), between, strict=True)):
                down = f"{path}.{number}.{locals_[2]}.weight"
                check_known(
                    last, made / (block.weights32[down].norm(dim=0) / old[down].norm(dim=0))
                )
        walk.advance(block_name, {})
    with torch.no_grad():
        assert distance(model(tokens).logits, wanted) <= RTOL


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, make_tokens: MakeTokens, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``run(model, algo, tokens=..., **options)``: quantizes, calibrated on random tokens."""

    def quantized(model: Path, algo: str, tokens: Tensor, **changes: Any) -> qplug.Result:
        monkeypatch.setattr(
            "qplug.run.planned.calibration_tokens", lambda *args, **kwargs: Samples(tokens)
        )
        options: dict[str, Any] = {
            "group_size": 16,
            "backend": "compressed-tensors",
            "device": "cpu",
            "algorithm_options": {
                n: o
                for n, o in {"awq": {"ratios": 3, "clip_steps": 3}, "osplus": {"steps": 3}}.items()
                if n in algo.split("+")
            },
            **changes,
        }
        return qplug.quantize(str(model), tmp_path / algo, algo=algo, **options)

    return quantized


def unpacked(out: Path) -> Mapping[str, Tensor]:
    return dict(qplug.reading.folder.open_folder(str(out), Session.alone()).weights())


@pytest.mark.parametrize(
    ("name", "algo", "scheme"),
    [
        ("mixtral", "awq", "W4A16"),
        ("mixtral", "smoothquant+gptq", "W8A8"),
        ("mixtral", "rtn", "FP8"),
        ("qwen3-moe", "awq+gptq", "W4A16"),
        ("qwen2-moe", "osplus", "W8A8"),
        ("deepseek-v3", "gptq", "W4A16_ASYM"),
        ("deepseek-v3", "awq", "W8A8_STATIC"),
    ],
)
def test_every_algorithm_takes_experts(
    name: str, algo: str, scheme: str, family: Family, make_tokens: MakeTokens, run: Any
) -> None:
    size = 16 if scheme.startswith("W4") else None
    result = run(family(name), algo, make_tokens(6, 24), scheme=scheme, group_size=size)
    view = model_view(open_checkpoint(family(name)))
    assert set(result.errors) == view.quantizable
    assert all(0 < error < 0.3 for error in result.errors.values())
    # Some experts get fewer tokens than they have channels.
    completed = {f"{block}.{NAMES[name][0]}" for block in view.blocks if algo != "rtn"}
    assert {
        note.partition(": fewer tokens than channels reached ")[0] for note in result.notes
    } <= (completed if {"awq", "gptq"} & {*algo.split("+")} else set())
    assert set(result.losses) == view.quantizable
    assert qplug.verify(str(result.out)).problems == ()
    for weight in unpacked(result.out).values():
        assert torch.isfinite(weight).all()
    # The router is there as a float, moved with what it reads.
    routers = [n for n in view.linears if n.endswith(("mlp.gate", "moe.gate"))]
    held, source = (
        load_file(result.out / "model.safetensors"),
        load_file(family(name) / "model.safetensors"),
    )
    for router in routers:
        assert held[f"{router}.weight"].dtype == source[f"{router}.weight"].dtype
        moved = not torch.equal(held[f"{router}.weight"], source[f"{router}.weight"])
        assert moved == (algo not in ("gptq", "rtn"))


@pytest.mark.parametrize(
    ("name", "algo"),
    [
        *(("mixtral", algo) for algo in ("awq", "gptq", "smoothquant", "osplus", "rtn")),
        ("qwen3-moe", "awq+gptq"),
        ("qwen2-moe", "gptq"),
        ("deepseek-v3", "awq"),
    ],
)
def test_an_expert_that_saw_no_token_is_rounded_to_nearest_unless_the_layer_completes_it(
    name: str, algo: str, family: Family, make_tokens: MakeTokens, run: Any
) -> None:
    tokens = make_tokens(1, 1)  # goes to two experts of four
    schemes = {"rtn": "W8A8_STATIC", "smoothquant": "W8A8", "osplus": "W8A8"}
    options: dict[str, Any] = {}
    if algo in schemes:
        options = {"scheme": schemes[algo], "group_size": None}
    if calibrated := {"awq", "gptq"} & {*algo.split("+")}:
        options["algorithm_options"] = {part: {"prior": 0.0} for part in calibrated}
    result = run(family(name), algo, tokens, **options)
    path, locals_, _ = NAMES[name]
    view = model_view(open_checkpoint(family(name)))
    mixtures = {
        n for n in view.blocks if any(q.startswith(f"{n}.{path}.") for q in view.quantizable)
    }
    notes = [note for note in result.notes if "no token reached" in note]
    assert {note.partition(f".{path}: ")[0] for note in notes} == mixtures
    (note,) = (note for note in notes if note.startswith(f"{BLOCK}."))
    unseen = note.partition("no token reached ")[2].split(", ")
    assert len(unseen) == 2
    manifest = read_manifest(result.out)
    assert manifest is not None
    assert {block for block in mixtures if f"{block}.{path}" in manifest.experts} == mixtures
    counts = manifest.experts[f"{BLOCK}.{path}"]
    assert [str(number) for number, count in enumerate(counts) if not count] == unseen
    weights, source = unpacked(result.out), load_file(family(name) / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    grouped = qplug.preset("W4A16").with_group_size(16)
    args = (qplug.preset(schemes[algo]) if algo in schemes else grouped).weights
    for number in unseen:
        down = f"{BLOCK}.{path}.{number}.{locals_[2]}.weight"
        wanted = dequantize(round_to_nearest(source[down].float(), args))
        torch.testing.assert_close(weights[down].float(), wanted, rtol=1e-4, atol=1e-5)
        if algo == "gptq":
            gate = f"{BLOCK}.{path}.{number}.{locals_[0]}.weight"
            wanted = dequantize(round_to_nearest(source[gate].float(), args))
            torch.testing.assert_close(weights[gate].float(), wanted, rtol=1e-4, atol=1e-5)
        assert f"{BLOCK}.{path}.{number}.{locals_[2]}" not in result.losses


def test_experts_of_a_layer_have_one_scale_of_inputs(
    family: Family, make_tokens: MakeTokens, run: Any
) -> None:
    out = run(family("deepseek-v3"), "rtn", make_tokens(4, 16), scheme="FP8", group_size=None).out
    scales = {n: t for n, t in load_file(out / "model.safetensors").items() if "input_scale" in n}
    for part in ("gate_proj", "down_proj"):
        own = [t for n, t in scales.items() if n.startswith(f"{BLOCK}.mlp.experts.") and part in n]
        assert len(own) == 4
        assert len({float(scale) for scale in own}) == 1
    # Weights keep a scale for each expert.
    weights = load_file(out / "model.safetensors")
    own = [weights[f"{BLOCK}.mlp.experts.{e}.gate_proj.weight_scale"] for e in range(4)]
    assert len({float(scale) for scale in own}) == 4


@pytest.mark.parametrize("scheme", ["W8A8", "FP8"])
@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3"])
def test_rounded_inputs_of_experts_can_be_measured(
    name: str, scheme: str, family: Family, make_tokens: MakeTokens, run: Any
) -> None:
    """What ``eval`` computes with is the quantized model, experts and their inputs included."""
    tokens = make_tokens(3, 16)
    out = run(
        family(name),
        "rtn" if scheme == "FP8" else "smoothquant",
        tokens,
        scheme=scheme,
        group_size=None,
    ).out
    with torch.no_grad():
        rounded = qplug.load(str(out))(tokens).logits
        plain = qplug.load(str(out), quantize_activations=False)(tokens).logits
        floats = reference(family(name))(tokens).logits
    assert 1e-4 < distance(rounded, plain) < 0.2
    assert distance(rounded, floats) < 0.3


@pytest.mark.parametrize(("name", "turns"), [("mixtral", 3 * 4), ("deepseek-v3", 3 * 6 + 2)])
def test_true_sequential_takes_all_experts_in_one_turn(
    name: str,
    turns: int,
    family: Family,
    make_tokens: MakeTokens,
    run: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    use_codes = LiveBlock.use_codes

    def counted(self: LiveBlock, codes: Any) -> None:
        seen.append(len(codes))
        use_codes(self, codes)

    monkeypatch.setattr(LiveBlock, "use_codes", counted)
    options = {"gptq": {"true_sequential": True, "correct": 0.5}}
    result = run(family(name), "gptq", make_tokens(4, 16), algorithm_options=options)
    assert all(error < 0.5 for error in result.losses.values())
    assert len(seen) == turns - 3  # the first of a block has none before


# --- beside the float model -----------------------------------------------------------------------


def test_drift_is_that_of_tokens_an_expert_has_in_both_models(
    family: Family, start_walk: StartWalk, make_tokens: MakeTokens
) -> None:
    folder, tokens = family("mixtral"), make_tokens(4, 16)
    walk = start_walk(folder, tokens, propagate="quantized", with_drift=True, batch_size=3)
    block = walk.gather("model.layers.0")
    codes = {
        n.name: round_to_nearest(n.weight, QuantArgs("int4", "channel")) for n in block.linears
    }
    names = {f"{n.removeprefix('model.layers.0.')}.weight" for n in codes}
    floats = {f"{block.name}.{n}": v for n, v in block.weights32.items() if n not in names}
    walk.advance(block.name, block.effective_parameters(codes, floats, torch.float32))
    block = walk.gather(BLOCK)

    x, chosen = routed(folder, tokens)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    source = open_checkpoint(folder)
    as_on_disk(model, model_view(source).blocks, source.tensors)
    for name, weight in codes.items():
        model.get_submodule(name).weight.data.copy_(dequantize(weight))
    experts = next(
        m for n, m in model.named_modules() if n.startswith(BLOCK) and isinstance(m, Experts)
    )
    seen: list[tuple[Tensor, ...]] = []
    experts.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    with torch.no_grad():
        model.eval()(tokens, use_cache=False)
    ((mine, mine_chosen, _),) = seen
    moved = 0
    for number, part in enumerate(experts_group(block).by_expert):
        now = (mine_chosen == number).any(-1)
        both = now & (chosen == number).any(-1)
        moved += int((now & ~both).sum())
        assert part.tokens == int(now.sum())
        drift = mine[both].T.double() @ (x[both] - mine[both]).double()
        assert part.drift is not None
        assert distance(part.drift, drift) <= 1e-4
    assert moved  # some tokens go to another expert than in the float model
