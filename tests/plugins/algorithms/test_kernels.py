"""The GPU's kernels against the plain torch that says what they mean. Run by make test-gpu."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
import torch
from torch import Tensor

import qplug
from qplug import PRESETS, InputGroup, QuantArgs
from qplug.api.algorithm import Effort
from qplug.calibration import observation
from qplug.calibration.channels import Channels
from qplug.calibration.hidden_states import HiddenStates
from qplug.calibration.samples import Samples
from qplug.calibration.statistics import Statistics
from qplug.calibration.walk import Walk
from qplug.checkpoint.open import open_checkpoint
from qplug.machine.memory import free_workspaces
from qplug.machine.session import Session
from qplug.model.view import model_view
from qplug.numerics.clipping import clip_errors, diagonal_blocks, scaled_differences
from qplug.numerics.losses import output_errors
from qplug.numerics.scales import minmax_scale, range_scale, weight_range
from qplug.numerics.straight_through import round_in_range
from qplug.registry.registry import Registry
from qplug.run.warm_up import first_uses
from qplug_gptq import solver

pytestmark = pytest.mark.gpu

# Rows that fill no program's share, and one program alone.
SHAPES = [(70, 256), (300, 384), (1000, 512)]


def random_layers(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Three weights, and the Gram matrices of inputs with channels of different sizes."""
    torch.manual_seed(0)
    inputs = torch.randn(3, 4000, width) * torch.rand(3, 1, width) * 3
    return torch.randn(3, rows, width) * 0.02, inputs.mT @ inputs


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "scheme", [name for name, scheme in PRESETS.items() if scheme.weights.dtype != "e2m1"]
)
def test_a_block_of_columns_is_rounded_to_the_same_codes(
    scheme: str, shape: tuple[int, int]
) -> None:
    from qplug_gptq.kernel import round_columns_on_gpu

    args = PRESETS[scheme].weights
    weight, gram = random_layers(*shape)
    found = [minmax_scale(own, args) for own in weight]
    scale = torch.stack([scale for scale, _ in found])
    zero = None if args.symmetric else torch.stack([z for _, z in found if z is not None])
    order = torch.arange(shape[1]).expand(3, shape[1])
    factor, _ = solver.inverse_factor(gram, order, 0.05)
    scales, zeros = solver.column_scales(scale, zero, args, order[:, :128], shape[0])
    work, corner = weight.mT[:, :128].contiguous(), factor[:, :128, :128]
    assert solver.rounder(work.cuda(), args, 128) is round_columns_on_gpu
    on_gpu = round_columns_on_gpu(
        work.cuda(), scales.cuda(), None if zeros is None else zeros.cuda(), corner.cuda(), args
    )
    on_cpu = solver.round_columns(work.clone(), scales, zeros, corner, args)
    same = on_gpu[0].cpu() == on_cpu[0]
    # An error that is pushed on in another order may fall on the other side of a tie.
    assert same.float().mean() > 0.9995
    exact = same.all(1, keepdim=True).expand(same.shape)
    # A value is rounded once for each column before it, independently; then it is divided.
    rounding = 128**0.5 * torch.finfo(torch.float32).eps * float(work.abs().max())
    atol = rounding / float(corner.diagonal(dim1=1, dim2=2).min())
    assert torch.allclose(on_gpu[1].cpu()[exact], on_cpu[1][exact], rtol=1e-3, atol=atol)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A16"])
def test_errors_of_clips_are_those_of_plain_torch(
    scheme: str, size: int, shape: tuple[int, int]
) -> None:
    args: QuantArgs = replace(PRESETS[scheme].with_group_size(size).weights, scale_dtype="bfloat16")
    weight, gram = random_layers(*shape)
    low, high = weight_range(weight.flatten(0, 1), args)
    candidates = [range_scale(low * ratio, high * ratio, args) for ratio in (1.07, 1, 0.9, 0.6)]
    scales = torch.stack([scale for scale, _ in candidates])
    zeros = None if args.symmetric else torch.stack([z for _, z in candidates if z is not None])
    blocks = diagonal_blocks(gram, size)
    wanted = clip_errors(weight, scales, zeros, blocks, args)
    found = clip_errors(
        weight.cuda(), scales.cuda(), None if zeros is None else zeros.cuda(), blocks.cuda(), args
    )
    # TF32 has ten bits; the sum is of a few thousand products of either sign.
    assert ((found.cpu() - wanted).abs() <= 4e-3 * wanted).all()


@pytest.mark.parametrize("algo", ["awq", "gptq", "awq+gptq"])
def test_a_run_on_the_gpu_is_as_good_as_one_on_the_cpu(algo: str, tmp_path: Path) -> None:
    losses = {}
    for device in ("cpu", "cuda"):
        result = qplug.quantize(
            "qplug:demo", tmp_path / device, algo=algo, device=device, samples=16, seq_len=128
        )
        losses[device] = sum(result.losses.values()) / len(result.losses)
        assert qplug.verify(str(tmp_path / device)).ok
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.02)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A16"])
def test_scaled_differences_are_those_of_plain_torch(
    scheme: str, steps: int, size: int, shape: tuple[int, int]
) -> None:
    scheme_args = PRESETS[scheme].with_group_size(size).with_scale_dtype("bfloat16").weights
    weight, gram = random_layers(*shape)
    scale = torch.rand(3, shape[1]) + 0.5
    losses, differences = [], []
    for device in ("cpu", "cuda"):
        blocks = diagonal_blocks(gram.to(device), size)
        made = scaled_differences(
            weight.to(device), scheme_args, scale.to(device), blocks, steps=steps, smallest=0.6
        )
        losses.append(output_errors(made, gram.to(device)).cpu())
        differences.append(made.float().cpu())
    assert torch.allclose(losses[1], losses[0], rtol=2e-2)
    # Equal but for bfloat16, save where two clips are about as good.
    close = torch.isclose(differences[0], differences[1], rtol=1e-2, atol=1e-6)
    assert close.float().mean() > 0.97


@pytest.mark.parametrize("shape", [*SHAPES, (40, 100), (257, 777), (300, 5000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_of_outputs_are_those_of_plain_torch(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight, gram = random_layers(*shape)
    difference = weight.to(dtype)
    found = output_errors(difference.cuda(), gram.cuda()).cpu()
    wanted = ((difference.double() @ gram.double()) * difference.double()).sum((1, 2))
    assert torch.allclose(found, wanted, rtol=1e-3)


def test_a_kernel_is_compiled_once_for_all_numbers_of_rows() -> None:
    from qplug.numerics.losses_kernel import _output_errors

    device = torch.cuda.current_device()
    before = len(_output_errors.device_caches[device][0])
    for rows, width in ((16, 1024), (130, 2048), (2048, 1024), (4096, 4096), (40, 7168)):
        output_errors(
            torch.ones(1, rows, width, device="cuda"), torch.eye(width, device="cuda")[None]
        )
    assert len(_output_errors.device_caches[device][0]) <= before + 1


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A8"])
def test_every_first_use_works_on_a_gpu(scheme: str) -> None:
    """A run leaves their errors to what comes after, so that nobody would see them."""
    efforts: frozenset[Effort] = frozenset({"searches", "solves"})
    for use in first_uses([PRESETS[scheme].weights], efforts, torch.device("cuda")):
        use()
    torch.cuda.synchronize()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [24, 32, 128, None])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_rounding_in_a_range_and_its_gradients_are_those_of_plain_torch(
    wanted: torch.dtype, symmetric: bool, size: int | None, shape: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    rows, width = shape[0], 360 if size == 24 else shape[1]
    strategy = "group" if size else "channel"
    args = QuantArgs("int4", strategy, size, symmetric=symmetric, scale_dtype="bfloat16")
    weight = torch.randn(rows, width) * 0.02
    weight[0], weight[1], weight[2] = weight[0].abs(), -weight[1].abs(), 0
    weight[3] = weight[3].round(decimals=2)  # several extremes
    pull = torch.randn(rows, width).bfloat16().float()
    of_scales = args.scale_shape((rows, width))
    kept = [torch.rand(of_scales) * 0.6 + 0.5 for _ in range(1 if symmetric else 2)]
    found = []
    for device in ("cpu", "cuda"):
        given = [x.to(device, copy=True).requires_grad_() for x in (weight, *kept)]
        made = round_in_range(given[0], given[1:], args, wanted)
        (made.float() * pull.to(device)).sum().backward()
        grads = [x.grad.cpu() for x in given if x.grad is not None]
        assert len(grads) == len(given)
        found.append([made.detach().to(wanted).cpu(), *grads])
    for plain, kernel in zip(*found, strict=True):
        # A scale or code that is half-way between two may fall on the other side.
        close = torch.isclose(plain, kernel, rtol=1e-3, atol=1e-5 * float(plain.abs().max()))
        assert close.float().mean() > 0.999


def test_workspaces_of_threads_are_freed() -> None:
    matrix = torch.ones(256, 256, device="cuda")

    def multiply() -> None:
        torch.mm(matrix, matrix)

    free_workspaces(matrix.device)
    before = torch.cuda.memory_allocated()
    with ThreadPoolExecutor(4) as threads:
        barrier = Barrier(4)
        for _ in range(4):
            threads.submit(lambda: (barrier.wait(), multiply()))
    assert torch.cuda.memory_allocated() > before + (4 << 20)
    free_workspaces(matrix.device)
    assert torch.cuda.memory_allocated() < before + (1 << 20)


def test_hidden_states_come_back_as_they_went() -> None:
    device = torch.device("cuda")
    states = HiddenStates(device)
    batches = [torch.randn(3, 50, 64, device=device).bfloat16() for _ in range(5)]
    for batch in batches:
        states.append(batch)
    for index, batch in enumerate(states):
        assert torch.equal(batch, batches[index])
        states.put(index, batch * 2)
    assert all(torch.equal(a, b * 2) for a, b in zip(states, batches, strict=True))


def test_statistics_on_a_gpu_are_those_of_plain_torch() -> None:
    """More columns than are computed at a time; half-precision rows, sums in float32."""
    x = (torch.randn(500, 2500) * torch.rand(2500)).bfloat16()
    y = x + 0.1 * torch.randn(500, 2500).bfloat16()
    known = Statistics(2500, torch.device("cuda"), 10, with_drift=True)
    for rows in (slice(0, 200), slice(200, 500)):
        known.observe(x[rows].cuda(), 5, y[rows].cuda())
    gram = x.double().T @ x.double()
    drift = x.double().T @ (y.double() - x.double())
    assert known.drift is not None
    assert (known.gram.cpu() - gram).norm() <= 1e-5 * gram.norm()
    assert torch.equal(known.gram, known.gram.T)
    assert (known.drift.cpu() - drift).norm() <= 5e-3 * drift.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [1, 40, 2500])
def test_extremes_and_sums_of_channels_are_those_of_plain_torch(
    width: int, dtype: torch.dtype
) -> None:
    """Three tensors in a row, of which the second has no rows; twice the same rows."""
    x = (torch.randn(333, width) * torch.rand(width)).to(dtype)
    cuts = [0, 100, 100, 333]
    channels = Channels.of_no_rows(3, width, torch.device("cuda"))
    for _ in range(2):
        channels.add(x.cuda(), torch.tensor(cuts).cuda())
    for number in range(3):
        known, rows = channels.one(number), x[cuts[number] : cuts[number + 1]]
        wanted = Channels.of_no_rows(1, width, torch.device("cpu"))
        for _ in range(2):
            wanted.add(rows)
        assert torch.equal(known.low.cpu(), wanted.low)
        assert torch.equal(known.high.cpu(), wanted.high)
        rounding = 1e-6 * wanted.absolute
        assert ((known.total.cpu() - wanted.total).abs() <= rounding).all()
        assert ((known.absolute.cpu() - wanted.absolute).abs() <= rounding).all()


def test_channels_on_a_gpu_keep_what_is_not_finite() -> None:
    x = torch.ones(200, 3)
    x[3, 0], x[4, 1] = torch.nan, torch.inf
    channels = Channels.of_no_rows(1, 3, torch.device("cuda"))
    channels.add(x.cuda())
    assert channels.low[0].isfinite().tolist() == [False, True, True]
    assert channels.high[0].isfinite().tolist() == [False, False, True]


def test_experts_that_are_computed_together_give_the_statistics_of_each(
    family: Callable[..., Path], make_tokens: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few experts at once, against one after the other."""
    source = open_checkpoint(family("mixtral", torch.bfloat16))
    view = model_view(source)
    schemes = {name: PRESETS["W4A16"].with_group_size(16) for name in view.quantizable}
    samples = Samples(make_tokens(8, 40))

    def statistics(most: int) -> dict[str, InputGroup]:
        monkeypatch.setattr(observation, "_TOGETHER", most)
        if not most:
            monkeypatch.setattr(observation, "multiplies_together", lambda *_: False)
        walk = Walk(source, view, schemes, samples, Session.alone("cuda", registry=Registry([])))
        block = walk.gather(view.blocks[0])
        walk.close()
        parts = [part for group in block.groups for part in (group, *group.by_expert)]
        return {part.linears[0].name: part for part in parts}

    together, apart = statistics(100), statistics(0)
    assert together.keys() == apart.keys()
    for name, part in apart.items():
        found = together[name]
        assert found.tokens == part.tokens
        assert found.sample.shape == part.sample.shape
        for of in ("gram", "mean", "mean_abs", "low", "high", "sample"):
            one, other = getattr(found, of), getattr(part, of)
            # Products are of bfloat16; another kernel may round an input of the last linear apart.
            assert torch.allclose(one, other, rtol=2e-2, atol=1e-2 * float(other.abs().max())), of
