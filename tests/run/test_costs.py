"""The model of costs counts what a run computes, and a dry run says it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

import qplug
from qplug.calibration import groups_apart
from qplug.calibration.groups_apart import GroupRoom
from qplug.calibration.portions import room_of
from qplug.checkpoint.names import is_within, relative_name
from qplug.checkpoint.open import open_checkpoint
from qplug.model.on_disk import as_on_disk
from qplug.model.skeleton import Skeleton
from qplug.model.view import model_view
from qplug.run import costs
from qplug.run.costs import Machine, estimate, room
from qplug.run.rates import CPU_CORE, H100
from qplug.run.workload import BlockWork, Readers, Workload, readers

Cli = Callable[..., Result]
Family = Callable[..., Path]


def _work(tokens: int = 1 << 18, blocks: int = 4, count: int = 1) -> Workload:
    one = Readers(4096, 8192, count, 1 / count, experts=count > 1)
    block = BlockWork((one,), 0, 2 * one.weights, one.weights // 2, 2 * count)
    return Workload((block,) * blocks, 1 << 28, frozenset({"solves"}), tokens, 4096, 1 << 25)


def test_linears_of_one_module_and_one_width_read_one_tensor() -> None:
    attention = {"q_proj": (64, 64), "k_proj": (16, 64), "v_proj": (16, 64), "o_proj": (64, 64)}
    mlp = {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}
    shapes = {f"self_attn.{name}": shape for name, shape in attention.items()}
    for path in ("mlp.shared", *(f"mlp.experts.{n}" for n in range(8))):
        shapes |= {f"{path}.{name}": shape for name, shape in mlp.items()}
    found = readers(shapes, 2)
    assert {*found} == {
        Readers(64, 96),  # q, k, v
        Readers(64, 64),  # o
        Readers(64, 192),
        Readers(96, 64),
        Readers(64, 192, 8, 0.25, experts=True),
        Readers(96, 64, 8, 0.25, experts=True),
    }
    assert sum(one.weights for one in found) == sum(map(math.prod, shapes.values()))


def test_processes_share_work_but_no_set_of_linears() -> None:
    one, two, many = (estimate(_work(), Machine(H100, processes=n), 0) for n in (1, 2, 64))
    assert one.seconds > two.seconds > many.seconds
    assert one.stages["quantize"] == two.stages["quantize"] == many.stages["quantize"]
    assert two.stages["passing on"] == pytest.approx(one.stages["passing on"] / 2)
    experts = [estimate(_work(count=8), Machine(H100, processes=n), 0) for n in (1, 2)]
    assert experts[1].stages["quantize"] == pytest.approx(experts[0].stages["quantize"] / 2)


def test_a_run_without_data_waits_for_the_disk_and_takes_one_process() -> None:
    found = estimate(_work(tokens=0), Machine(H100, processes=8), 0)
    assert found.processes == 1
    assert "statistics" not in found.stages
    assert found.gpu_memory == 23 << 25


def test_a_small_memory_has_experts_in_portions() -> None:
    work = _work(count=64)
    whole = estimate(work, Machine(H100), 0)
    part = estimate(work, Machine(H100, memory=20 << 30), 0)
    assert whole.gpu_memory is not None
    assert part.gpu_memory is not None
    assert part.gpu_memory < 20 << 30 < whole.gpu_memory


def test_memory_of_a_cpu_has_the_block() -> None:
    on_cpu = estimate(_work(), Machine(CPU_CORE, on_gpu=False), 0)
    assert on_cpu.gpu_memory is None
    assert on_cpu.memory > 11 * 4096 * 8192


@pytest.mark.parametrize("name", ["qwen3-moe", "deepseek-v3"])
def test_a_block_takes_what_the_run_divides_it_by(family: Family, name: str) -> None:
    """The estimate knows shapes alone; the run has the modules and their weights."""
    source = open_checkpoint(family(name))
    view = model_view(source)
    block = view.blocks[1]
    module = as_on_disk(Skeleton(source.folder).take(), view.blocks, source.tensors)[block]
    weights = {
        relative_name(block, tensor): source.read(tensor).bfloat16()
        for tensor in source.tensors
        if is_within(block, tensor)
    }
    shapes = {
        relative_name(block, linear): view.linears[linear]
        for linear in view.quantizable
        if is_within(block, linear)
    }
    own = readers(shapes, 2)
    others = sum(w.numel() for w in weights.values()) - sum(one.weights for one in own)
    found = room(BlockWork(own, others, 0, 0, len(shapes)), 1000)
    counted = room_of(module, weights, 1000)
    grams = 4 * sum(one.count * one.width**2 for one in own if not one.experts)
    assert found.rest - grams == counted.rest
    assert (found.expert, found.experts) == (counted.expert, counted.experts)
    assert (found.most, found.kept, found.rounded) == (counted.most, counted.kept, counted.rounded)


@pytest.mark.parametrize("alone", ["mlp.down_proj", "self_attn.o_proj", ""])
def test_a_block_is_divided_in_the_estimate_as_in_the_run(
    alone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever linears are quantized; one input group ``alone``, or all if it is empty."""
    divided: list[GroupRoom] = []
    estimated: list[GroupRoom] = []
    groups_of = costs._groups

    class Noted(GroupRoom):
        def parts(self, budget: float) -> list[list[int]] | None:
            divided.append(self)
            return super().parts(budget)

    def noted(block: BlockWork, work: Workload) -> GroupRoom | None:
        if (found := groups_of(block, work)) is not None:
            estimated.append(found)
        return found

    monkeypatch.setattr(groups_apart, "GroupRoom", Noted)
    monkeypatch.setattr(costs, "_groups", noted)
    ignore = (f"re:^(?!.*{alone}).*",) if alone else ()
    qplug.quantize(
        "qplug:demo",
        tmp_path / "out",
        ignore=ignore,
        algo="gptq",
        samples=2,
        seq_len=16,
        memory="1KiB",
        device="cpu",
    )
    run, known = divided[0], estimated[0]
    assert len(run.groups) == 4
    assert sorted(known.groups) == sorted(run.groups)
    assert (known.others, known.whole) == (run.others, run.whole)
    assert len(known.floats) == (3 if alone else 0)
    parts = known.parts(0)
    assert parts is not None
    assert len(parts) == 4
    taken = known.peak(math.inf) - known.peak(0)
    assert taken > 0, "parts take less than the whole"
    held = run.whole - sum(4 * known.groups[number][1] ** 2 for number in known.floats)
    assert known.peak(math.inf) == held


def test_a_dry_run_says_what_the_run_would_take(cli: Cli, tmp_path: Path) -> None:
    words: tuple[object, ...]
    words = ("quantize", "qplug:demo", "--out", tmp_path / "out", "--device", "cpu", "--dry-run")
    words += ("--algo", "gptq", "--samples", 2, "--seq-len", 16)
    said = cli(*words)
    assert said.exit_code == 0, said.output
    assert " it takes about " in said.stdout
    assert " of memory, and " in said.stdout
    told = json.loads(cli(*words, "--json").stdout)
    found = told["plan"]["estimate"]
    assert found["seconds"] == pytest.approx(sum(found["stages"].values()))
    assert (found["gpu_memory"], found["disk"]) == (None, told["bytes"])


def test_no_estimate_of_an_algorithm_whose_time_is_not_known(llama: Path, tmp_path: Path) -> None:
    done = qplug.quantize(str(llama), tmp_path / "out", algo="hqq", device="cpu", dry_run=True)
    assert done.estimate is None
