"""A run stops after a block whose output is too far from the float model's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import qplug
from qplug import QplugError
from qplug.calibration.samples import Samples
from qplug.calibration.stream_distance import StreamDistance
from qplug.machine.processes import ALONE
from qplug.run import stop_at as watched
from qplug.testing import tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    Contents = Callable[[Path], dict[str, bytes | None]]

HOW: dict[str, Any] = {
    **{"scheme": "W4A16", "group_size": 32, "device": "cpu", "algo": "gptq"},
    **{"samples": 3, "seq_len": 24, "batch_size": 2},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def distances(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What each block of the following runs is away."""
    found: list[float] = []
    stop = watched.StopAt.__call__

    def call(self: watched.StopAt, step: Any, distance: float) -> None:
        found.append(distance)
        stop(self, step, distance)

    monkeypatch.setattr(watched.StopAt, "__call__", call)
    return found


def test_the_distance_is_that_of_the_hidden_states_after_each_block(
    tiny: str, tmp_path: Path, distances: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Samples] = []
    begin = Samples.digest

    def digest(samples: Samples) -> str:
        seen.append(samples)
        return begin(samples)

    monkeypatch.setattr(Samples, "digest", digest)
    qplug.quantize(tiny, tmp_path / "out", backend="fake", stop_at=1e9, **HOW)
    tokens = seen[0].tokens
    states = []
    for folder in (tiny, tmp_path / "out"):
        model: Any = qplug.load(str(folder))
        blocks, found = model.model.layers, []
        for block in blocks:
            block.register_forward_hook(lambda _, __, output, found=found: found.append(output))
        with torch.no_grad():
            model(input_ids=tokens)
        states.append([x[0] if isinstance(x, tuple) else x for x in found])
    expected = [
        ((quantized - own).norm(dim=-1) / own.norm(dim=-1)).mean().item()
        for own, quantized in zip(*states, strict=True)
    ]
    assert len(distances) == len(expected) == 2
    assert distances == pytest.approx(expected, rel=0.02)  # blocks compute in bfloat16 or float32


@pytest.mark.slow
def test_watching_changes_no_byte(tiny: str, tmp_path: Path, contents: Contents) -> None:
    qplug.quantize(tiny, tmp_path / "one", backend="vllm", **HOW)
    qplug.quantize(tiny, tmp_path / "two", backend="vllm", stop_at=1e9, **HOW)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_it_names_the_block_and_the_way_out_and_keeps_the_blocks_before(
    tiny: str, tmp_path: Path, distances: list[float], contents: Contents
) -> None:
    words = {**HOW, "backend": "vllm", "overrides": {"model.layers.0.*": "FP8_DYNAMIC"}}
    out = tmp_path / "out"
    with pytest.raises(QplugError) as refused:
        qplug.quantize(tiny, out, stop_at=0.02, **words)
    first, second = distances
    assert first < 0.02 < second
    found = re.fullmatch(
        rf"model\.layers\.1: the hidden states after it are {second:.3f} away from the float "
        rf"model's \({first:.3f} before it\), more than --stop-at 0\.02; give it 8 bits: "
        r"--override '(model\.layers\.1\.\*)=(FP8_DYNAMIC)', or raise --stop-at: a run that "
        r"differs in --stop-at alone goes on with the blocks before",
        str(refused.value),
    )
    assert found is not None, refused.value
    assert not out.exists()
    result = qplug.quantize(tiny, out, stop_at=0.5, **words)
    assert result.resumed
    assert distances[2:] == pytest.approx([first, second], rel=1e-3)
    qplug.quantize(tiny, tmp_path / "at-once", **words)
    assert contents(out) == contents(tmp_path / "at-once")
    pattern, scheme = found.groups()
    better = {**words, "overrides": {**words["overrides"], pattern: scheme}}
    assert qplug.quantize(tiny, tmp_path / "better", dry_run=True, **better).dry_run  # it is served


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"algo": "rtn"}, "rtn needs no calibration data"),
        ({"propagate": "float"}, "only the float model runs"),
        ({"backend": "hf"}, "only the float model runs"),
        ({"stop_at": 0.0}, "must be above 0"),
    ],
)
def test_a_run_that_cannot_see_it_is_refused(
    changes: dict[str, Any], why: str, tiny: str, tmp_path: Path
) -> None:
    with pytest.raises(QplugError, match=why):
        qplug.quantize(tiny, tmp_path / "out", **{**HOW, "stop_at": 0.1, **changes})


def test_padding_does_not_count() -> None:
    real = torch.tensor([[True, False]])
    distance = StreamDistance([real, None])
    float_states = torch.ones(1, 2, 4)
    distance.add(
        0, torch.stack([torch.full((4,), 1.5), torch.full((4,), 99.0)])[None], float_states
    )
    distance.add(1, float_states * 2, float_states)
    assert distance.shared(ALONE) == pytest.approx((0.5 + 1 + 1) / 3)
