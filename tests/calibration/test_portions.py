"""Experts that do not fit into memory at once are quantized in portions, to the same codes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import qplug
from qplug import InputGroup, QplugError
from qplug.calibration import block_room, groups_apart, portions
from qplug.calibration.groups_apart import GroupRoom
from qplug.calibration.live_block import LiveBlock
from qplug.calibration.portions import divide_experts
from qplug.calibration.samples import Samples
from qplug.calibration.walk import Walk
from qplug.checkpoint.open import open_checkpoint
from qplug.machine.memory import parse_size
from qplug.model import input_groups
from qplug.model.input_groups import GroupPaths
from qplug.model.on_disk import as_on_disk
from qplug.model.skeleton import Skeleton
from qplug.model.view import model_view
from qplug.output.manifest import read_manifest
from qplug_gptq.gptq import GPTQ

Family = Callable[..., Path]
MakeTokens = Callable[..., Tensor]
NAMES = ("undisturbed", "out")


def _quantize(model: Path, out: Path, **options: object) -> qplug.Result:
    return qplug.quantize(
        str(model),
        out,
        backend="compressed-tensors",
        scheme="W4A16",
        group_size=16,
        device="cpu",
        **options,  # type: ignore[arg-type]
    )


@pytest.fixture(autouse=True)
def tokens(make_tokens: MakeTokens, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Random tokens, which stand in for a dataset."""
    drawn = make_tokens(6, 32)
    monkeypatch.setattr("qplug.run.planned.calibration_tokens", lambda *_, **__: Samples(drawn))
    return drawn


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The portions of each block that was divided; two experts have room, whatever is free."""
    seen: list[int] = []

    def divide(*args: object) -> list[range] | None:
        most = max((len(layer) for layer in portions.experts_in(args[0]).values()), default=0)  # type: ignore[arg-type]
        found = [range(start, min(start + 2, most)) for start in range(0, most, 2)]
        seen.append(len(found))
        return found or None

    monkeypatch.setattr(block_room, "divide_experts", divide)
    monkeypatch.setattr(portions, "BESIDES", 0)
    return seen


@pytest.mark.parametrize(
    ("name", "algo"),
    [("qwen3-moe", "gptq"), ("mixtral", "awq+gptq"), ("deepseek-v3", "gptq"), ("qwen2-moe", "awq")],
)
def test_portions_of_experts_give_a_folder_that_is_right(
    family: Family, name: str, algo: str, tmp_path: Path, sizes: list[int]
) -> None:
    result = _quantize(family(name), tmp_path / "out", algo=algo)
    assert max(sizes) == 2
    assert qplug.verify(str(tmp_path / "out")).ok
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert set(manifest.losses) == set(result.losses)
    assert any(len(counts) == 4 for counts in manifest.experts.values())


@pytest.mark.parametrize("name", ["deepseek-v3", "qwen2-moe"])
def test_portions_of_large_experts_need_no_weights_of_others(
    family: Family, name: str, tmp_path: Path, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A trial multiplies and divides a large matrix, which changes its last bits.
    monkeypatch.setattr(input_groups, "_LARGE", 0)
    _quantize(family(name), tmp_path / "out", algo="gptq")
    assert max(sizes) == 2
    assert qplug.verify(str(tmp_path / "out")).ok


def test_portions_have_the_codes_of_the_whole(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int]
) -> None:
    model = family("qwen3-moe")
    _quantize(model, tmp_path / "parts", algo="gptq")
    monkeypatch.setattr(block_room, "divide_experts", divide_experts)
    _quantize(model, tmp_path / "whole", algo="gptq")
    assert max(sizes) == 2
    parts, whole = (load_file(tmp_path / out / "model.safetensors") for out in ("parts", "whole"))
    same = sum(int(torch.equal(parts[name], whole[name])) for name in whole)
    assert parts.keys() == whole.keys()
    # Layers that are solved side by side are other ones, so that a sum may end in another bit.
    assert same >= 0.95 * len(whole)


class Stop(KeyboardInterrupt):
    """Ctrl-C in the middle of a portion."""


def test_a_run_that_stopped_in_a_portion_goes_on_to_the_same_bytes(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int]
) -> None:
    model = family("qwen2-moe")
    _quantize(model, tmp_path / "undisturbed", algo="gptq")
    solve, portion = GPTQ._solve, "model.layers.1.mlp.experts.3."

    def stopped(self: GPTQ, unit: tuple[list[InputGroup], InputGroup]) -> object:
        if any(group.linears[0].name.startswith(portion) for group in unit[0]):
            raise Stop
        return solve(self, unit)

    with monkeypatch.context() as patch:
        patch.setattr(GPTQ, "_solve", stopped)
        with pytest.raises(Stop):
            _quantize(model, tmp_path / "out", algo="gptq")
    assert not (tmp_path / "out").exists()
    assert _quantize(model, tmp_path / "out", algo="gptq").resumed > 0
    assert max(sizes) == 2
    files = [{p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in NAMES]
    assert files[0] == files[1]


def test_what_needs_all_experts_at_once_is_refused_in_words(
    family: Family, tmp_path: Path, sizes: list[int]
) -> None:
    with pytest.raises(QplugError, match="raise --memory"):
        _quantize(
            family("qwen3-moe"),
            tmp_path / "out",
            algo="gptq",
            algorithm_options={"gptq": {"true_sequential": True}},
        )


def test_a_budget_decides_how_many_experts_a_portion_has(family: Family) -> None:
    folder = family("qwen3-moe")
    source = open_checkpoint(folder)
    model = Skeleton(folder).take()
    block = as_on_disk(model, model_view(source).blocks, source.tensors)["model.layers.1"]
    weights = {
        name.removeprefix("model.layers.1."): source.read(name)
        for name in source.tensors
        if name.startswith("model.layers.1.")
    }
    assert divide_experts(block, weights, 1000, None) is None
    assert divide_experts(block, weights, 1000, 1 << 40) is None
    assert divide_experts(block, weights, 1000, 1) == [range(n, n + 1) for n in range(4)]


@pytest.mark.parametrize(
    ("text", "size"), [("20GiB", 20 << 30), ("1.5 GB", 1_500_000_000), ("500mib", 500 << 20)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "20", "GiB", "-3GB", "20 bytes", "1e3GB"])
def test_other_words_are_no_size(text: str) -> None:
    with pytest.raises(QplugError, match="is no size; write 20GiB"):
        parse_size(text)


# --- blocks without experts -----------------------------------------------------------------------


def test_input_groups_apart_have_the_bytes_of_the_whole(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = family("llama"), []

    def divide(structure: Sequence[GroupPaths], *_: object) -> list[tuple[GroupPaths, ...]]:
        seen.append(len(structure))
        return [(group,) for group in reversed(structure)]

    _quantize(model, tmp_path / "whole", algo="gptq")
    monkeypatch.setattr(block_room, "divide_groups", divide)
    result = _quantize(model, tmp_path / "parts", algo="gptq")
    assert set(seen) == {4}
    assert qplug.verify(str(tmp_path / "parts")).ok
    assert result.losses.keys() == {*result.errors}
    whole, parts = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "parts"))
    assert whole == parts


@pytest.mark.parametrize(
    ("algo", "options"),
    [("awq+gptq", {}), ("awq", {}), ("gptq", {"gptq": {"true_sequential": True}})],
)
def test_what_needs_the_whole_block_is_not_divided(
    family: Family,
    algo: str,
    options: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(block_room, "divide_groups", lambda *_: pytest.fail("divided"))
    _quantize(family("llama"), tmp_path / "out", algo=algo, algorithm_options=options)


@given(
    others=st.integers(0, 100),
    groups=st.lists(st.tuples(st.integers(1, 10_000), st.integers(1, 100)), max_size=6),
    budget=st.integers(0, 400_000),
)
def test_parts_have_each_group_once_and_keep_to_the_budget(
    others: int, groups: list[tuple[int, int]], budget: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups_apart, "BESIDES", 0)
        room = GroupRoom(others, groups)
        parts = room.parts(budget)
        assert room.peak(budget) <= max(budget, room.whole)
        if parts is None:
            assert room.whole <= budget or len(groups) < 2
            return
        assert sorted(number for part in parts for number in part) == [*range(len(groups))]
        assert all(parts)
        alone = max(GroupRoom(others, [group]).whole for group in groups)
        staying = 4 * (others + sum(count for count, _ in groups))
        assert room.peak(budget) <= max(budget, staying + alone)


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_a_part_is_freed_before_the_next_is_made(
    family: Family,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sizes: list[int],
) -> None:
    made: list[weakref.ref[LiveBlock]] = []
    observe, live = Walk.observe, Walk.live

    def watched(self: Walk, *args: Any, **options: Any) -> Any:
        assert all(part() is None for part in made)
        return observe(self, *args, **options)

    def kept(self: Walk, *args: Any) -> LiveBlock:
        assert all(part() is None for part in made)
        block = live(self, *args)
        made.append(weakref.ref(block))
        return block

    monkeypatch.setattr(Walk, "observe", watched)
    monkeypatch.setattr(Walk, "live", kept)
    monkeypatch.setattr(
        block_room, "divide_groups", lambda structure, *_: [(g,) for g in structure]
    )
    gc.disable()  # nothing is left to the garbage collector either
    try:
        _quantize(family(name), tmp_path / "out", algo="gptq")
    finally:
        gc.enable()
    assert len(made) > 4
