"""A block whose output is too far from the float model's gets more bits, and the run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import qplug
from qplug import QplugError
from qplug.api.scheme import Scheme, preset
from qplug.choosing.ladder import Ladder
from qplug.cli.plan_text import plan_paragraph
from qplug.output.manifest import read_manifest
from qplug.output.shard_layout import ShardLayout
from qplug.recipe.recipe import Export, Job, Recipe
from qplug.recipe.words import changed
from qplug.run import raising
from qplug.run.perform import perform
from qplug.testing import tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Starter
    from small_models import Family

    Contents = Callable[[Path], dict[str, bytes | None]]

HOW: dict[str, Any] = {
    **{"scheme": "W4A16", "group_size": 32, "device": "cpu", "algo": "gptq", "backend": "vllm"},
    **{"samples": 3, "seq_len": 24, "batch_size": 2},
}
#: Between the distances after the first block (0.021) and after the second one (0.031).
LIMIT = 0.026
RAISE: dict[str, Any] = {"stop_at": LIMIT, "on_stop": "raise"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_dry_run_names_the_schemes_from_the_lowest_to_the_highest(
    tiny: str, tmp_path: Path
) -> None:
    two_bits = preset("W2A16").with_group_size(32)
    words = {**HOW, "overrides": {"model.layers.1.*": two_bits}, "backend": "compressed-tensors"}
    plan = qplug.quantize(tiny, tmp_path / "out", dry_run=True, **words, **RAISE).plan
    assert plan is not None
    assert plan.raises_to == ("W4A16 g32", "W8A16 g32", "float")
    sentence = "A block whose output is more than 0.026 from the float model's is raised to "
    assert f"{sentence}W4A16 g32, then W8A16 g32, then float." in plan_paragraph(plan)


class Killed(BaseException):
    """Ends a run as a signal would."""


def kill_after(step: int) -> Callable[[int, int, str, float | None], None]:
    def watch(done: int, *_: object) -> None:
        if done == step:
            raise Killed

    return watch


def equal_recipe(out: Path) -> dict[str, Any]:
    """The options of a run that gives each layer the scheme that it has in ``out``."""
    recipe = json.loads((out / "qplug.json").read_text())["recipe"]
    overrides = {pattern: Scheme.from_dict(scheme) for pattern, scheme in recipe["overrides"]}
    return {"overrides": overrides, "ignore": recipe["ignore"]}


def test_a_raised_block_is_as_if_its_scheme_had_been_asked_for(
    tiny: str, tmp_path: Path, contents: Contents
) -> None:
    out = tmp_path / "out"
    result = qplug.quantize(tiny, out, **HOW, **RAISE)
    (block,) = result.raised
    assert (block.name, block.schemes) == ("model.layers.1", ("W4A16 g32", "W8A16 g32"))
    before, after = block.distances
    assert before is not None
    assert after is not None
    assert after < LIMIT < before
    assert qplug.verify(str(out)).ok
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.raised == result.raised
    assert {scheme.name for name, scheme in manifest.schemes.items() if ".1." in name} == {"W8A16"}
    assert block.sentence in (out / "README.md").read_text()
    qplug.quantize(tiny, tmp_path / "asked", **HOW, **equal_recipe(out))
    found, asked = contents(out), contents(tmp_path / "asked")
    written = ("README.md", "qplug.json")  # they say why
    assert {n: x for n, x in found.items() if n not in written} == {
        n: x for n, x in asked.items() if n not in written
    }


def test_killed_as_it_raises_a_block_it_goes_on_to_the_same_bytes(
    tiny: str, tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    qplug.quantize(tiny, tmp_path / "at-once", **HOW, **RAISE)

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(ShardLayout, "moved_to", killed)  # the journal has the block already
        with pytest.raises(Killed):
            qplug.quantize(tiny, tmp_path / "out", **HOW, **RAISE)
    with pytest.raises(Killed):  # the shard has the new layout, and the block is not in it
        qplug.quantize(tiny, tmp_path / "out", watch=kill_after(1), **HOW, **RAISE)
    qplug.quantize(tiny, tmp_path / "out", **HOW, **RAISE)
    assert contents(tmp_path / "out") == contents(tmp_path / "at-once")


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 3, 4])
@pytest.mark.parametrize("limit", [LIMIT, 0.01])
def test_killed_after_any_step(
    step: int, limit: float, tiny: str, tmp_path: Path, contents: Contents
) -> None:
    words = {**HOW, "stop_at": limit, "on_stop": "raise", "shard_bytes": 60_000}
    qplug.quantize(tiny, tmp_path / "at-once", **words)
    with pytest.raises(Killed):
        qplug.quantize(tiny, tmp_path / "out", watch=kill_after(step), **words)
    assert qplug.quantize(tiny, tmp_path / "out", **words).resumed
    assert contents(tmp_path / "out") == contents(tmp_path / "at-once")
    assert qplug.verify(str(tmp_path / "out")).ok


@pytest.mark.slow
def test_a_run_that_stopped_goes_on_when_it_may_raise(
    tiny: str, tmp_path: Path, contents: Contents
) -> None:
    out = tmp_path / "out"
    with pytest.raises(QplugError, match="more than --stop-at"):
        qplug.quantize(tiny, out, stop_at=LIMIT, **HOW)
    assert qplug.quantize(tiny, out, **HOW, **RAISE).resumed
    qplug.quantize(tiny, tmp_path / "at-once", **HOW, **RAISE)
    assert contents(out) == contents(tmp_path / "at-once")


@pytest.mark.slow
def test_raised_blocks_are_not_mixed_into_a_run_that_raises_none(tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Killed):
        qplug.quantize(tiny, out, watch=kill_after(5), **HOW, **RAISE)
    with pytest.raises(QplugError, match="another --on-stop; delete it, or pass --overwrite"):
        qplug.quantize(tiny, out, **HOW)
    assert not qplug.quantize(tiny, out, overwrite=True, **HOW).resumed
    with pytest.raises(Killed):
        qplug.quantize(tiny, tmp_path / "two", watch=kill_after(3), **HOW)
    with pytest.raises(QplugError, match="an earlier run without this limit has finished it"):
        qplug.quantize(tiny, tmp_path / "two", **{**HOW, **RAISE, "stop_at": 0.01})


@pytest.mark.slow
def test_a_block_that_stays_too_far_stops_the_run_and_keeps_the_blocks_before(
    tiny: str, tmp_path: Path
) -> None:
    words = {**HOW, "overrides": {"model.layers.0.*": "FP8_DYNAMIC"}}
    with pytest.raises(QplugError, match=r"also when it is raised to W8A16 g32 \(.*float") as error:
        qplug.quantize(tiny, tmp_path / "out", stop_at=0.0005, on_stop="raise", **words)
    assert "goes on with the blocks before" in str(error.value)
    assert qplug.quantize(tiny, tmp_path / "out", stop_at=9.0, on_stop="raise", **words).resumed


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"on_stop": "raise"}, "--on-stop raise: give --stop-at DISTANCE too"),
        ({"on_stop": "rise", "stop_at": 0.1}, "--on-stop rise: must be stop or raise"),
        ({"on_stop": "raise", "stop_at": 0.1, "algo": "rtn"}, "rtn needs no calibration data"),
        (RAISE, "--on-stop raise: vllm: one folder has one scheme; leave --on-stop out"),
    ],
)
def test_a_run_that_cannot_raise_is_refused_at_once(
    changes: dict[str, Any],
    why: str,
    tiny: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ladder = Ladder({}, "one folder has one scheme")
    monkeypatch.setattr(raising, "find_ladder", lambda *_, **__: ladder)
    with pytest.raises(QplugError, match=why):
        qplug.quantize(tiny, tmp_path / "out", **{**HOW, **changes})
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_transformers_loads_it(tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    qplug.quantize(tiny, out, **HOW, **RAISE)
    tokens = torch.arange(12)[None]
    model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    own: Any = qplug.load(str(out)).eval().float()
    with torch.no_grad():
        expected, found = own(tokens).logits, model(tokens).logits
    assert torch.allclose(found, expected, atol=2e-2 * float(expected.abs().max()))


@pytest.mark.slow
def test_a_job_knows_a_folder_with_raised_blocks_as_its_own(tiny: str, tmp_path: Path) -> None:
    words: Any = {name: value for name, value in HOW.items() if name != "device"}
    recipe = changed(Recipe(), words)
    exports = (Export(tmp_path / "one"), Export(tmp_path / "two", "compressed-tensors"))
    job = Job(model=tiny, recipe=recipe, exports=exports)
    qplug.quantize(tiny, exports[0].out, **HOW, **RAISE)
    done = perform(job, device="cpu", stop_at=LIMIT, on_stop="raise")
    assert done.kept == (exports[0].out,)
    assert [block.name for result in done.results for block in result.raised] == ["model.layers.1"]


@pytest.mark.slow
def test_two_processes_raise_the_same_blocks(tiny: str, tmp_path: Path, start: Starter) -> None:
    line = ["quantize", tiny, "--algo", "gptq", "--scheme", "W4A16", "--group-size", 32]
    line += ["--backend", "vllm", "--device", "cpu", "--samples", 4, "--seq-len", 24, "--no-check"]
    line += ["--stop-at", 0.031, "--on-stop", "raise"]
    for count in (1, 2):
        ended = start(*line, "--out", tmp_path / str(count), count=count).wait()
        assert ended.codes == [0] * count, ended.output
        assert "model.layers.1: raised from W4A16 g32" in ended.output
    alone, together = read_manifest(tmp_path / "1"), read_manifest(tmp_path / "2")
    assert alone is not None
    assert together is not None
    assert together.schemes == alone.schemes
    assert qplug.verify(str(tmp_path / "2")).ok


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_the_experts_of_a_layer_are_raised_together(
    name: str, family: Family, tmp_path: Path, contents: Contents
) -> None:
    source = str(family(name))
    words = {**HOW, "backend": "compressed-tensors", "group_size": 16}
    words |= {"stop_at": 0.01, "on_stop": "raise"}
    raised = qplug.quantize(source, tmp_path / "at-once", **words).raised
    manifest = read_manifest(tmp_path / "at-once")
    assert raised
    assert manifest is not None
    for block in raised:
        inside = {s.name for n, s in manifest.schemes.items() if n.startswith(f"{block.name}.")}
        assert inside == {"W8A16"}
    assert qplug.verify(str(tmp_path / "at-once")).ok
    with pytest.raises(Killed):
        qplug.quantize(source, tmp_path / "two", watch=kill_after(3), **words)
    qplug.quantize(source, tmp_path / "two", **words)
    assert contents(tmp_path / "two") == contents(tmp_path / "at-once")
