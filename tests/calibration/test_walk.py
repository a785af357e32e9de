"""A walk through the blocks sees and computes what the whole model does, killed or not."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import qplug
from qplug.api.events import Result
from qplug.calibration import batches, observation
from qplug.calibration.live_block import LiveBlock
from qplug.calibration.samples import Samples
from qplug.calibration.walk import Walk
from qplug.checkpoint.open import open_checkpoint
from qplug.model.view import model_view

Family = Callable[..., Path]
StartWalk = Callable[..., Walk]
MakeTokens = Callable[..., Tensor]

#: What float32 may lose when sums over tokens are taken in another order.
RTOL = 1e-5

RUN: dict[str, Any] = {
    "dataset": "text",
    "samples": 6,
    "seq_len": 20,
    "group_size": 16,
    "backend": "compressed-tensors",
    "device": "cpu",
}
W8A8: dict[str, Any] = {"scheme": "W8A8", "group_size": None}
FP8: dict[str, Any] = {"scheme": "FP8", "group_size": None}
STATIC: dict[str, Any] = {"scheme": "W8A8_STATIC", "group_size": None}
CACHE: dict[str, Any] = {"kv_cache": "fp8"}
#: Searches that take no longer than a test needs.
SHORT: dict[str, dict[str, Any]] = {
    "awq": {"ratios": 3, "clip_steps": 3, "clip_in_search": 0},
    "osplus": {"steps": 3},
    "omniquant": {"epochs": 1},
    "signround": {"epochs": 2},
}

FAMILIES = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3"),
    *("opt", "opt, norm after", "gpt-neox", "phi"),
)


@dataclass
class Seen:
    """What a plain forward pass of the whole model shows, all samples one after the other."""

    entered: dict[str, list[Tensor]] = field(default_factory=dict)
    left: dict[str, list[Tensor]] = field(default_factory=dict)
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)

    def hidden(self, block: str) -> Tensor:
        return torch.cat(self.entered[block])

    def after(self, block: str) -> Tensor:
        return torch.cat(self.left[block])

    def rows(self, linear: str) -> Tensor:
        return torch.cat([x.flatten(0, -2) for x in self.inputs[linear]])


@torch.no_grad()
def plain_forward(model: PreTrainedModel, tokens: Tensor, batch: int) -> Seen:
    """Every block's input and output, and every linear's input, ``batch`` samples at a time."""
    seen = Seen()

    def block_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            incoming = args[0] if args else kwargs["hidden_states"]
            seen.entered.setdefault(name, []).append(incoming)
            outgoing = output if isinstance(output, Tensor) else output[0]
            seen.left.setdefault(name, []).append(outgoing)

        return hook

    def linear_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            seen.inputs.setdefault(name, []).append(args[0])

        return hook

    handles = []
    for name, module in model.named_modules():
        if type(module).__name__.endswith(("DecoderLayer", "NeoXLayer")):
            handles.append(module.register_forward_hook(block_hook(name), with_kwargs=True))
        elif isinstance(module, nn.Linear):
            # Ahead of hooks that round what enters.
            handles.append(module.register_forward_pre_hook(linear_hook(name), prepend=True))
    for part in tokens.split(batch):
        model.eval()(part, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def reference(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for parameter in model.parameters():
        # Where a matrix begins in memory decides how it is multiplied: not anywhere in a file.
        parameter.data = parameter.data.clone()
    return model


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def at_a_time(samples: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(batches._BATCH_TOKENS, "cpu", samples * length)


def blocks_of(folder: Path) -> tuple[str, ...]:
    return model_view(open_checkpoint(folder)).blocks


# --- statistics and hidden states -----------------------------------------------------------------


def outputs_of(block: LiveBlock) -> Tensor:
    """What leaves the float model's block, ``[samples, tokens, width]``."""
    assert block.reconstruction is not None
    return torch.cat([batch.target for batch in block.reconstruction.batches()])


@pytest.mark.parametrize(("samples", "length", "batch"), [(5, 20, 2), (4, 20, 4), (1, 1, 1)])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_walk_through_float_blocks_is_a_forward_pass(
    name: str,
    samples: int,
    length: int,
    batch: int,
    family: Family,
    start_walk: StartWalk,
    make_tokens: MakeTokens,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens = make_tokens(samples, length)
    seen = plain_forward(reference(family(name)), tokens, batch)
    at_a_time(batch, length, monkeypatch)
    walk = start_walk(family(name), tokens, propagate="float", with_targets=True)
    for block_name in blocks_of(family(name)):
        # The very same operations in the same order: the very same numbers.
        assert torch.equal(torch.cat([*walk.hidden]), seen.hidden(block_name))
        block = walk.gather(block_name)
        known = set()
        for group in block.groups:
            for linear in group.linears:
                x = seen.rows(linear.name).double()
                assert group.tokens == len(x) == samples * length
                assert distance(group.gram, x.T @ x) <= RTOL
                assert distance(group.mean_abs, x.abs().mean(0)) <= RTOL
                assert (group.mean - x.mean(0)).norm() <= RTOL * x.abs().mean(0).norm()
                assert torch.equal(group.low, x.amin(0).float())
                assert torch.equal(group.high, x.amax(0).float())
                assert torch.equal(group.sample, x.float())  # few tokens: all are kept
                known.add(linear.name)
        assert known == {n for n in seen.inputs if n.startswith(f"{block_name}.")}
        assert torch.equal(outputs_of(block), seen.after(block_name))
        walk.advance(block_name, {})


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 100])
def test_batches_of_any_size_give_the_same(
    batch: int,
    family: Family,
    start_walk: StartWalk,
    make_tokens: MakeTokens,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens = make_tokens(7, 12)
    seen = plain_forward(reference(family("gemma2")), tokens, 7)
    at_a_time(batch, 12, monkeypatch)
    walk = start_walk(family("gemma2"), tokens, propagate="float", with_targets=True)
    assert [len(hidden) for hidden in walk.hidden] == [len(part) for part in tokens.split(batch)]
    for block_name in blocks_of(family("gemma2")):
        block = walk.gather(block_name)
        for group in block.groups:
            x = seen.rows(group.linears[0].name).double()
            assert group.tokens == 84
            assert distance(group.gram, x.T @ x) <= RTOL
            assert distance(group.sample, x) <= RTOL
        assert distance(outputs_of(block), seen.after(block_name)) <= RTOL
        walk.advance(block_name, {})


def test_a_sample_longer_than_a_batch(
    family: Family,
    start_walk: StartWalk,
    make_tokens: MakeTokens,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(batches._BATCH_TOKENS, "cpu", 5)
    walk = start_walk(family("llama"), make_tokens(2, 12))
    assert [hidden.shape[:2] for hidden in walk.hidden] == [(1, 12), (1, 12)]


@pytest.mark.parametrize("name", ["qwen2", "mistral", "gemma2", "gemma3"])
def test_windows_are_those_of_each_layer(
    name: str, family: Family, start_walk: StartWalk, make_tokens: MakeTokens
) -> None:
    """Were all layers to see everything, or all little, the statistics would be others."""
    tokens = make_tokens(3, 20)
    walk = start_walk(family(name), tokens, propagate="float")
    model = reference(family(name))
    sliding = [
        getattr(model.config, "layer_types", ["sliding_attention"] * 3)[i] == "sliding_attention"
        for i in range(3)
    ]
    seen = plain_forward(model, tokens, 3)
    model.config.sliding_window = 64  # as good as none
    wide = plain_forward(model, tokens, 3)
    model.config.sliding_window = 2
    narrow = plain_forward(model, tokens, 3)
    fed_alike = True  # until the first layer with a window
    for block_name, slides in zip(blocks_of(family(name)), sliding, strict=True):
        output = f"{block_name}.self_attn.o_proj"
        group = walk.gather(block_name).groups[1]
        walk.advance(block_name, {})
        assert distance(group.sample, seen.rows(output)) <= RTOL
        for other in (wide, narrow):
            same = distance(group.sample, other.rows(output)) <= RTOL
            assert same == (fed_alike and not slides)
        fed_alike = fed_alike and not slides
    assert not fed_alike


# --- some of the tokens themselves ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "room", "wanted"), [(2, 10, 10), (1, 5, 5), (5, 30, 30), (5, 70, 70), (2, 1000, 100)]
)
def test_the_sample_is_of_tokens_from_all_over(
    batch: int,
    room: int,
    wanted: int,
    family: Family,
    start_walk: StartWalk,
    make_tokens: MakeTokens,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens = torch.randperm(4000, generator=torch.Generator().manual_seed(0))[:100].view(5, 20)
    seen = plain_forward(reference(family("llama")), tokens, batch)
    at_a_time(batch, 20, monkeypatch)
    monkeypatch.setattr(observation, "SAMPLE", room)
    block = start_walk(family("llama"), tokens).gather("model.layers.0")
    for group in block.groups:
        x = seen.rows(group.linears[0].name)
        assert len(group.sample) == wanted
        places = [int((x == row).all(1).nonzero()[0]) for row in group.sample]
        assert places == sorted(places)
        batches = {place // (batch * 20) for place in places}
        assert len(batches) == -(-5 // batch)
        if batch == 5:  # evenly, to the end of a batch
            assert places == [i * 100 // wanted for i in range(wanted)]


# --- what the quantized blocks give ---------------------------------------------------------------


@pytest.fixture
def record(
    monkeypatch: pytest.MonkeyPatch, passes_in_float32: None
) -> dict[str, tuple[Tensor, Tensor]]:
    """What entered and what left each block of the runs to come, which compute in float32."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    advance = Walk.advance

    def watched(self: Walk, name: str, served: Any) -> None:
        before = torch.cat([*self.hidden]).clone()
        advance(self, name, served)
        seen[name] = before, torch.cat([*self.hidden]).clone()

    monkeypatch.setattr(Walk, "advance", watched)
    return seen


@pytest.fixture
def tokens_given(make_tokens: MakeTokens, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Runs calibrate on these tokens, not on those of a dataset."""
    tokens = make_tokens(5, 20)
    monkeypatch.setattr(
        "qplug.run.planned.calibration_tokens", lambda *args, **kwargs: Samples(tokens)
    )
    return tokens


@pytest.mark.parametrize(
    ("name", "algo", "scheme", "backend"),
    [
        ("llama", "awq+gptq", "W4A16", "compressed-tensors"),
        ("llama", "awq", "W4A16_ASYM", "compressed-tensors"),
        ("llama", "gptq", "FP8_DYNAMIC", "compressed-tensors"),
        ("llama", "awq", "W8A8", "compressed-tensors"),
        ("llama", "awq", "W4A16", "fake"),
        ("llama", "smoothquant+gptq", "FP8", "compressed-tensors"),
        ("llama", "awq", "W8A8_STATIC", "fake"),
        ("llama", "awq", "W4A16 fp8", "compressed-tensors"),
        ("gemma2", "rtn", "FP8 fp8", "compressed-tensors"),
        ("gpt-neox", "rtn", "W8A8_STATIC fp8", "fake"),
        ("qwen2", "smoothquant+gptq", "W8A8", "compressed-tensors"),
        ("gemma2", "awq", "W4A16", "compressed-tensors"),
        ("gemma3", "awq+gptq", "W4A16", "fake"),
        ("phi3", "awq", "W4A16", "compressed-tensors"),
        ("opt", "osplus", "W8A8", "compressed-tensors"),
        ("gpt-neox", "awq+gptq", "W4A16_ASYM", "compressed-tensors"),
        ("mixtral", "awq+gptq", "W4A16", "compressed-tensors"),
        ("deepseek-v3", "smoothquant", "W8A8", "compressed-tensors"),
    ],
)
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_a_block_is_fed_by_what_an_engine_computes(
    name: str,
    algo: str,
    scheme: str,
    backend: str,
    dtype: torch.dtype,
    tmp_path: Path,
    family: Family,
    tokens_given: Tensor,
    record: dict[str, tuple[Tensor, Tensor]],
) -> None:
    """``scheme`` may have that of a KV cache behind it."""
    source = family(name, dtype)
    scheme, _, cache = scheme.partition(" ")
    size = 16 if scheme.startswith("W4") else None
    out = qplug.quantize(
        str(source),
        tmp_path / "out",
        algo=algo,
        scheme=scheme,
        backend=backend,
        group_size=size,
        kv_cache=cache or None,
        algorithm_options={name: SHORT[name] for name in algo.split("+") if name in SHORT},
        device="cpu",
    ).out
    seen = plain_forward(qplug.load(str(out)), tokens_given, len(tokens_given))
    floats = plain_forward(reference(source), tokens_given, len(tokens_given))
    for block in blocks_of(source):
        entered, left = record[block]
        assert distance(entered, seen.hidden(block)) <= RTOL
        if block != blocks_of(source)[-1]:  # nobody is fed by that one
            assert distance(left, seen.after(block)) <= RTOL
        assert distance(left, floats.after(block)) > 100 * RTOL


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_blocks_can_be_fed_by_the_float_ones(
    name: str,
    tmp_path: Path,
    family: Family,
    tokens_given: Tensor,
    record: dict[str, tuple[Tensor, Tensor]],
) -> None:
    source = family(name)
    qplug.quantize(
        str(source),
        tmp_path / "out",
        algo="awq+gptq",
        group_size=16,
        backend="compressed-tensors",
        propagate="float",
        algorithm_options={"awq": SHORT["awq"]},
        device="cpu",
    )
    floats = plain_forward(reference(source), tokens_given, len(tokens_given))
    for block in blocks_of(source)[:-1]:  # nobody is fed by the last one
        assert torch.equal(record[block][1], floats.after(block))


# --- a run that is killed -------------------------------------------------------------------------


class Stop(KeyboardInterrupt):
    """Ctrl-C at a chosen step."""


Run = Callable[..., Result]


@pytest.fixture
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The options of a dataset that is quickly read."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(f"The number {i} is followed by {i + 1}." for i in range(60)))
    return {"path": str(file)}


@pytest.fixture
def run(tmp_path: Path, text: dict[str, str]) -> Run:
    """Quantizes to ``tmp_path / out``; ``stop=n`` interrupts it after n steps."""

    def quantized(source: Path, *, out: str = "out", stop: int | None = None, **kw: Any) -> Result:
        def watch(done: int, *_: object) -> None:
            if done == stop:
                raise Stop

        used = {algo: SHORT[algo] for algo in kw["algo"].split("+") if algo in SHORT}
        return qplug.quantize(
            str(source),
            tmp_path / out,
            watch=watch,
            **{**RUN, "dataset_options": text, "algorithm_options": used, **kw},
        )

    return quantized


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "propagate", "options"),
    [
        ("llama", torch.bfloat16, "quantized", {"algo": "awq+gptq"}),
        ("llama", torch.bfloat16, "quantized", {"algo": "smoothquant+gptq", **FP8, **CACHE}),
        ("opt", torch.bfloat16, "quantized", {"algo": "signround"}),
        (
            "opt",
            torch.float16,
            "quantized",
            {
                "algo": "osplus",
                **STATIC,
                **CACHE,
                "backend": "fake",
                "observer": "histogram",
            },
        ),
        ("llama", torch.bfloat16, "float", {"algo": "awq+gptq"}),
        ("llama", torch.bfloat16, "quantized", {"algo": "awq", "backend": "fake"}),
        ("gemma2", torch.bfloat16, "quantized", {"algo": "awq", "scheme": "W4A16_ASYM"}),
        ("qwen2", torch.float16, "quantized", {"algo": "smoothquant", **W8A8}),
        ("opt", torch.bfloat16, "quantized", {"algo": "osplus+gptq", **W8A8}),
        ("opt", torch.bfloat16, "float", {"algo": "osplus", **W8A8}),
        ("gpt-neox", torch.float32, "quantized", {"algo": "gptq"}),
        ("llama", torch.bfloat16, "float", {"algo": "rtn", **FP8, **CACHE}),
        (
            "qwen2",
            torch.bfloat16,
            "quantized",
            {"algo": "awq", **STATIC, "observer": "moving-average"},
        ),
        (
            "llama",
            torch.bfloat16,
            "quantized",
            {"algo": "omniquant", "scheme": "W4A16_ASYM"},
        ),
        ("gpt-neox", torch.bfloat16, "float", {"algo": "omniquant", **W8A8}),
    ],
)
def test_killed_after_any_block(
    name: str,
    dtype: torch.dtype,
    propagate: str,
    options: dict[str, Any],
    tmp_path: Path,
    family: Family,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_a_time(4, 20, monkeypatch)
    source = family(name, dtype)
    options = {**options, "propagate": propagate}
    wanted = contents(run(source, out="undisturbed", **options).out)
    gathered: list[str] = []
    gather = Walk.gather_parts
    monkeypatch.setattr(
        Walk, "gather_parts", lambda self, block: [gathered.append(block), gather(self, block)][1]
    )
    steps = len(model_steps := finished_steps(source))
    for stop in range(1, steps + 1):
        with pytest.raises(Stop):
            run(source, stop=stop, **options)
        assert not (tmp_path / "out").exists()
        gathered.clear()
        result = run(source, **options)
        assert result.resumed == stop
        assert gathered == [step for step in model_steps[result.resumed :] if step]
        assert contents(result.out) == wanted
        shutil.rmtree(result.out)
    assert result.resumed > 0
    assert {path.name for path in tmp_path.iterdir()} == {"undisturbed"}


def finished_steps(source: Path) -> list[str | None]:
    """The steps of a calibrated run in order: a block's name, or None for another tensor."""
    view = model_view(open_checkpoint(source))
    others = [
        tensor
        for tensor in open_checkpoint(source).tensors
        if not tensor.startswith(tuple(f"{block}." for block in view.blocks))
    ]
    parent = view.blocks[0].rpartition(".")[0]
    before = [tensor for tensor in others if tensor < parent]
    return [*(None for _ in before), *view.blocks, *(None for _ in others[len(before) :])]


@pytest.mark.parametrize(
    ("name", "dtype", "propagate", "options"),
    [
        ("mixtral", torch.bfloat16, "quantized", {"algo": "awq"}),
        ("qwen3-moe", torch.bfloat16, "float", {"algo": "rtn", **FP8}),
        ("deepseek-v3", torch.bfloat16, "quantized", {"algo": "smoothquant+gptq", **W8A8}),
    ],
)
def test_experts_are_taken_up_again(
    name: str,
    dtype: torch.dtype,
    propagate: str,
    options: dict[str, Any],
    family: Family,
    run: Run,
) -> None:
    """With the notes of experts that no token reached, and what is beside weights in a router."""
    source = family(name, dtype)
    options = {**options, "propagate": propagate, "samples": 2, "seq_len": 2}
    if "gptq" in options["algo"]:
        options["algorithm_options"] = {"gptq": {"correct": 0.5}}
    undisturbed = run(source, out="undisturbed", **options)
    with pytest.raises(Stop):
        run(source, stop=4, **options)
    again = run(source, **options)
    assert again.resumed > 1
    assert again.notes == undisturbed.notes
    assert contents(again.out) == contents(undisturbed.out)


def test_notes_of_resumed_blocks_are_told_again(family: Family, run: Run) -> None:
    source = family("llama")
    options: dict[str, Any] = {"algo": "gptq", "samples": 1, "seq_len": 3}
    options["algorithm_options"] = {"gptq": {"damp": 0.0}}  # three tokens leave much undecided
    undisturbed = run(source, out="undisturbed", **options)
    assert len(undisturbed.notes) == 3 * 4
    assert all("damping was raised from 0 to" in note for note in undisturbed.notes)
    with pytest.raises(Stop):
        run(source, stop=4, **options)
    again = run(source, **options)
    assert again.resumed > 0
    assert again.notes == undisturbed.notes


def test_killed_again_and_again(
    tmp_path: Path, family: Family, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on may be killed too; each takes up what all before it left."""
    source = family("llama")
    options = {"algo": "awq+gptq"}
    wanted = contents(run(source, out="undisturbed", **options).out)
    for stop in range(1, 6):
        with pytest.raises(Stop):
            run(source, stop=stop, **options)
    result = run(source, **options)
    assert result.resumed > 0
    assert contents(result.out) == wanted


def test_a_block_that_did_not_reach_the_disk_is_computed_again(
    tmp_path: Path, family: Family, run: Run
) -> None:
    source = family("llama")
    options = {"algo": "awq"}
    wanted = contents(run(source, out="undisturbed", **options).out)
    with pytest.raises(Stop):
        run(source, stop=4, **options)
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    # The second block alone is lost, as if a power cut had taken it: those around it stay.
    kept = [line for line in lines if '"step": 2' not in line]
    assert len(kept) == len(lines) - 1
    journal.write_text("".join(kept))
    result = run(source, **options)
    assert result.resumed == len(kept) - 1
    assert contents(result.out) == wanted


@pytest.mark.parametrize(
    "change",
    [
        {"propagate": "float"},
        {"samples": 7},
        {"seq_len": 21},
        {"seed": 1},
        {"algorithm_options": {"awq": {"ratios": 3}}},
    ],
)
def test_an_unfinished_run_with_other_data_is_not_taken_up(
    change: dict[str, Any], tmp_path: Path, family: Family, run: Run
) -> None:
    source = family("llama")
    with pytest.raises(Stop):
        run(source, stop=3, algo="awq")
    with pytest.raises(qplug.QplugError, match="holds an unfinished run with another"):
        run(source, algo="awq", **change)
    assert run(source, algo="awq").resumed > 0


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_a_closed_walk_leaves_nothing_to_the_garbage_collector(
    name: str, family: Family, start_walk: StartWalk, make_tokens: MakeTokens
) -> None:
    """The memory of a GPU would stay taken until Python collects, which may be never."""
    folder = family(name)
    walk = start_walk(folder, make_tokens(4, 16), batch_size=2)
    blocks = blocks_of(folder)
    for block in blocks[:-1]:
        walk.gather(block)
        walk.advance(block, {})
    live = walk.gather(blocks[-1])
    model = walk._blocks.model
    norm = model.get_parameter("model.norm.weight")
    held = [weakref.ref(tensor) for tensor in (*walk.hidden, *live.weights32.values(), norm)]
    held += [weakref.ref(group.gram) for group in live.groups]
    refs: list[weakref.ref[Any]] = [*held, weakref.ref(walk), weakref.ref(model)]
    gc.collect()
    gc.disable()
    try:
        walk.close()
        del walk, live, model, norm
        assert [found for ref in refs if (found := ref()) is not None] == []
    finally:
        gc.enable()
