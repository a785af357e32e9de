"""Passes through the model block by block compute what the whole model computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import Family
from transformers import AutoModelForCausalLM

from qplug import preset
from qplug.api.groups import dequantize
from qplug.calibration.samples import Samples
from qplug.checkpoint.open import open_checkpoint
from qplug.choosing import float_passes
from qplug.choosing.decisions import Decision
from qplug.choosing.float_passes import FloatPasses, Passed, Variant
from qplug.choosing.sensitivity import _in_random_direction, divergence, fisher
from qplug.choosing.static_scales import static_scales
from qplug.machine.session import Session
from qplug.model.view import model_view
from qplug.numerics.rounding import round_to_nearest
from qplug.registry.registry import Registry

TOKENS = torch.randint(5, 4000, (4, 24), generator=torch.Generator().manual_seed(1))
FAMILIES = ("gemma2", "qwen3-moe")


def passes_of(folder: object) -> FloatPasses:
    source = open_checkpoint(folder)  # type: ignore[arg-type]
    return FloatPasses(source, model_view(source), (), Session(Registry([])))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_are_those_of_the_whole_model(family: Family, name: str) -> None:
    folder, samples = family(name), Samples(TOKENS)
    passes = passes_of(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: dict[str, Passed] = {}
    passes.backwards([samples], lambda _, logits: logits.square().mean(), seen.__setitem__)
    logits = model(TOKENS).logits
    torch.testing.assert_close(passes.logits(samples), logits.detach(), atol=1e-4, rtol=1e-4)
    logits.square().mean().backward()
    own = {n: p.grad for n, p in model.named_parameters() if n.endswith("proj.weight")}
    compared = [n for n in seen if f"{n}.weight" in own]
    assert len(compared) >= 6
    for linear in compared:
        passed = seen[linear]
        torch.testing.assert_close(
            passed.gradient.mT @ passed.x, own[f"{linear}.weight"], atol=1e-4, rtol=1e-3
        )


def test_variants_of_a_block_are_as_if_computed_alone(family: Family) -> None:
    passes, samples = passes_of(family("qwen3-moe")), Samples(TOKENS)
    expected = passes.logits(samples)
    same, zero = Variant({}), Variant({"model.layers.1.self_attn.o_proj": torch.zeros(64, 96)})
    first, second, third = passes.logits_with(samples, 1, [same, zero, same]).chunk(3)
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(third, expected, atol=1e-5, rtol=1e-5)
    assert (second - expected).abs().max() > 0.1


def test_random_directions_have_the_covariance_of_the_fisher_information() -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, 0.5]).expand(1, 100_000, 4).clone().requires_grad_()
    samples = Samples(torch.ones(1, 100_000, dtype=torch.int64))
    _in_random_direction(torch.Generator().manual_seed(0), samples, logits).backward()
    assert logits.grad is not None
    p = logits[0, 0].detach().softmax(-1)
    torch.testing.assert_close(
        logits.grad[0].mT @ logits.grad[0] / 100_000, p.diag() - p.outer(p), atol=3e-3, rtol=0
    )


def gradients_of(
    folder: object, batches: list[Samples]
) -> tuple[dict[str, list[torch.Tensor]], list[tuple[int, int]]]:
    """The gradients by the output of each linear, batch by batch, and the reads of blocks."""
    reads: list[tuple[int, int]] = []
    seen: dict[str, list[torch.Tensor]] = {}

    def visit(name: str, passed: Passed) -> None:
        seen.setdefault(name, []).append(passed.gradient)

    passes_of(folder).backwards(
        batches,
        lambda _, logits: logits.square().mean(),
        visit,
        lambda done, count: reads.append((done, count)),
    )
    return seen, reads


def test_all_batches_pass_together_as_if_alone(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the memory for hidden states allows one batch at a time."""
    folder, batches = family("llama"), Samples(TOKENS).batches(2)
    monkeypatch.setattr(float_passes, "free_memory", lambda device: 1 << 40)
    together, reads = gradients_of(folder, batches)
    monkeypatch.setattr(float_passes, "free_memory", lambda device: 1)
    apart, more_reads = gradients_of(folder, batches)
    blocks = len(passes_of(folder).blocks)
    assert reads == [(n + 1, 2 * blocks) for n in range(2 * blocks)]
    assert len(more_reads) == 2 * len(reads)
    for name, gradients in together.items():
        assert len(gradients) == len(batches)
        assert all(map(torch.equal, gradients, apart[name]))


@pytest.mark.slow
def test_gradients_estimate_the_divergence_that_is_measured(family: Family) -> None:
    folder = family("llama")
    view = model_view(open_checkpoint(folder))
    names = [n for n in view.linears if n in view.quantizable]
    schemes = [preset("W4A16").with_group_size(16), preset("W8A8"), None]
    options = {Decision(name, (name,)): schemes for name in names}
    tokens = torch.randint(5, 4000, (8, 32), generator=torch.Generator().manual_seed(2))
    samples, passes = Samples(tokens), passes_of(folder)
    by_gradients = fisher(passes, options, samples, 8, seed=0, watch=lambda *_: None)
    measured = divergence(passes, options, samples, 8, watch=lambda *_: None)
    for scheme in schemes[:2]:
        estimate = sum(by_gradients[d][scheme] for d in options)
        true = sum(measured[d][scheme] for d in options)
        assert 0.6 < estimate / true < 1.6
    assert all(each[None] == 0 for each in by_gradients.values())


# --- static inputs --------------------------------------------------------------------------------


def peak_by_the_book(folder: Path, linear: str) -> torch.Tensor:
    """The largest magnitude of what enters ``linear`` of the whole model on ``TOKENS``."""
    seen: list[torch.Tensor] = []
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    hook = model.get_submodule(linear).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].abs().max())
    )
    with torch.no_grad():
        model(TOKENS)
    hook.remove()
    return torch.stack(seen).max()


def test_peaks_are_those_of_the_whole_model(family: Family) -> None:
    folder = family("llama")
    names = [f"model.layers.{n}.{part}_proj" for n in (0, 1) for part in ("self_attn.q", "mlp.up")]
    found = passes_of(folder).peaks(Samples(TOKENS).batches(1), names)
    assert found.keys() == {*names}
    for name in names:
        torch.testing.assert_close(found[name], peak_by_the_book(folder, name), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scheme", ["FP8", "W8A8_STATIC"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_static_inputs_have_one_scale_for_all_batches(
    family: Family, scheme: str, batch_size: int
) -> None:
    """The divergence is that of the whole model, with a scale from all of its tokens."""
    folder, name, how = family("llama"), "model.layers.1.mlp.down_proj", preset(scheme)
    assert how.activations is not None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    top = 448.0 if scheme == "FP8" else 127.0
    scale = peak_by_the_book(folder, name) / top

    def rounded(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        codes = (inputs[0] / scale).clamp(-top - (scheme != "FP8"), top)
        codes = codes.to(torch.float8_e4m3fn).float() if scheme == "FP8" else codes.round()
        return (codes * scale,)

    with torch.no_grad():
        before = model(TOKENS).logits.log_softmax(-1)
        linear = model.get_submodule(name)
        linear.weight.copy_(dequantize(round_to_nearest(linear.weight, how.weights)))
        linear.register_forward_pre_hook(rounded)
        after = model(TOKENS).logits.log_softmax(-1)
    expected = float((before.exp() * (before - after)).sum(-1).mean())
    decision, samples = Decision(name, (name,)), Samples(TOKENS)
    found = divergence(
        passes_of(folder), {decision: [how]}, samples, batch_size, watch=lambda *_: None
    )
    assert found[decision][how] == pytest.approx(expected, rel=0.02)


def test_scales_cover_all_batches(family: Family) -> None:
    name, how = "model.layers.0.mlp.down_proj", preset("W8A8_STATIC")
    decision, folder = Decision(name, (name,)), family("llama")
    scales = [
        static_scales(passes_of(folder), {decision: [how, None]}, Samples(TOKENS).batches(size))
        for size in (1, 4)
    ]
    wanted = peak_by_the_book(folder, name).reshape(1) / 127
    assert how.activations is not None
    for each in scales:
        torch.testing.assert_close(each[name][how.activations], wanted, rtol=1e-5, atol=0)
    assert static_scales(passes_of(folder), {decision: [preset("W8A8")]}, []) == {}


def test_experts_of_a_layer_share_a_scale(family: Family) -> None:
    folder, how = family("qwen3-moe"), preset("FP8")
    linears = model_view(open_checkpoint(folder)).linears
    experts = [name for name in linears if "layers.1.mlp.experts" in name]
    options = {Decision("model.layers.1.mlp.experts", tuple(experts)): [how]}
    found = static_scales(passes_of(folder), options, Samples(TOKENS).batches(2))
    assert how.activations is not None
    by_local: dict[str, set[float]] = {}
    for name in experts:
        scale = found[name][how.activations].item()
        by_local.setdefault(name.rpartition(".")[2], set()).add(scale)
    assert all(len(each) == 1 for each in by_local.values())
    assert by_local["gate_proj"] == by_local["up_proj"] != by_local["down_proj"]
