"""``--scheme auto``: budgets are held, folders are sound, and the choice is a plain recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import transformers
from small_models import SIZES, Family, randomise, save

import qplug
from qplug import QplugError
from qplug.checkpoint.open import open_checkpoint
from qplug.choosing import solver
from qplug.output.manifest import read_manifest
from qplug.output.writer import Writer
from qplug.recipe.files import read_job
from qplug.recipe.recipe import Recipe
from qplug.registry.registry import Registry
from qplug.run import choose
from qplug.run.perform import perform
from qplug.run.quantize import quantize

if TYPE_CHECKING:
    from click.testing import Result as CliResult

    Contents = Callable[[Path], dict[str, bytes | None]]

DATA: dict[str, Any] = {"samples": 2, "seq_len": 48, "backend": "vllm"}
AUTO: dict[str, Any] = {**DATA, "scheme": "auto"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama of two blocks, whose widths all kernels take, with a tokenizer."""
    config = transformers.LlamaConfig(
        **{**SIZES, "hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2},
        intermediate_size=256,
        num_key_value_heads=1,
        head_dim=64,
    )
    made = transformers.AutoModelForCausalLM.from_config(config)
    randomise(made)
    return str(save(made.bfloat16(), tmp_path_factory.mktemp("choose") / "model"))


def chosen(out: Path, model: str, **words: Any) -> qplug.Result:
    result = quantize(model, out, **{**AUTO, **words})
    assert qplug.verify(str(out), backend=words.get("backend", "vllm")).ok
    return result


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_bits_are_held_and_the_recipe_repeats_the_folder(
    model: str, tmp_path: Path, contents: Contents
) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    choice = chosen(out, model, bits=4.6).choice
    assert choice is not None
    assert 4.55 < choice.bits <= 4.6
    assert choice.bound <= choice.loss <= choice.bound * 1.001
    assert len({group.scheme for group in choice.groups}) > 1
    manifest = read_manifest(out)
    assert manifest is not None
    stored = open_checkpoint(out).tensors
    weights = [t.nbytes for n, t in stored.items() if n.rpartition(".")[0] in manifest.schemes]
    assert sum(weights) == choice.bytes
    recipe = Recipe.from_dict(manifest.recipe)
    assert not recipe.is_auto
    assert manifest.choice["limits"] == {"--bits": "4.6"}
    quantize(model, again, recipe)
    first, second = contents(out), contents(again)
    same = {name for name in first if first[name] == second[name]}
    assert first.keys() - same == {"qplug.json"}


@pytest.mark.slow
@pytest.mark.parametrize("size", ["2.7MB"])
def test_the_folder_is_no_larger_than_asked(model: str, tmp_path: Path, size: str) -> None:
    chosen(tmp_path / "out", model, size=size)
    asked = float(size[:-2]) * 1e6
    assert asked - 130_000 < bytes_of(tmp_path / "out") <= asked


@pytest.mark.slow
def test_the_smallest_folder_of_an_estimated_divergence(model: str, tmp_path: Path) -> None:
    by_bits = chosen(tmp_path / "bits", model, bits=4.6).choice
    assert by_bits is not None
    for factor in (0.7, 1.1):
        limit = factor * by_bits.loss
        choice = chosen(tmp_path / str(factor), model, max_kl=limit).choice
        assert choice is not None
        assert 0.8 * limit < choice.loss <= limit
        assert choice.bound <= choice.bytes
        assert (choice.bytes > by_bits.bytes) == (factor < 1)


def test_experts_of_a_layer_are_chosen_together(family: Family, tmp_path: Path) -> None:
    choice = chosen(tmp_path / "out", str(family("qwen3-moe")), bits=9).choice
    assert choice is not None
    assert [g.name for g in choice.groups if "experts" in g.name] == ["model.layers.1.mlp.experts"]


@pytest.mark.slow
def test_sglang_gets_one_format(model: str, tmp_path: Path) -> None:
    choice = chosen(tmp_path / "out", model, bits=5, backend="sglang").choice
    assert choice is not None
    assert {group.scheme.partition(" ")[0] for group in choice.groups} <= {
        "W4A16",
        "W4A16_ASYM",
        "W8A16",
        "float",
    }


@pytest.mark.slow
def test_layers_that_the_recipe_names_keep_its_scheme(model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    chosen(out, model, bits=6, overrides={"*.o_proj": "W8A16"}, ignore=["*.0.mlp.down_proj"])
    manifest = read_manifest(out)
    assert manifest is not None
    schemes = manifest.schemes
    assert {s.name for n, s in schemes.items() if n.endswith("o_proj")} == {"W8A16"}
    assert "model.layers.0.mlp.down_proj" not in schemes
    with pytest.raises(QplugError, match=r"must have one scheme, because engines merge it"):
        quantize(model, out, **AUTO, bits=5, overrides={"*.q_proj": "W8A16"}, overwrite=True)


@pytest.mark.slow
def test_by_measured_divergence(model: str, tmp_path: Path) -> None:
    measured, estimated = (
        chosen(tmp_path / how, model, bits=4.6, sensitivity=how).choice
        for how in ("divergence", "fisher")
    )
    assert measured is not None
    assert estimated is not None
    assert 0.5 < measured.loss / estimated.loss < 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({}, r"--scheme auto: needs a budget: --bits .* --size .* or --max-kl"),
        ({"bits": 4.5, "max_kl": 0.1}, r"--bits, --max-kl: --scheme auto takes one budget"),
        ({"bits": 3}, r"--bits 3: cannot be reached: the fewest that vllm serves are 4\.1"),
        ({"size": "1MB"}, r"--size 1MB: .*: the smallest folder that vllm serves takes 2"),
        ({"size": "9MB"}, r"--size 9MB: the float model is within this budget; lower it"),
        ({"size": "large"}, r"large: is no size"),
        ({"bits": 5, "backend": "hf"}, r"--scheme auto: hf stores float weights"),
        ({"bits": 5, "group_size": 64}, r"--group-size: --scheme auto chooses"),
        ({"scheme": "W4A16", "bits": 5}, r"--bits: a budget goes with --scheme auto"),
        ({"bits": 5, "overrides": {"*": "auto"}}, r"--override \*=auto: auto is for the whole"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    model: str, tmp_path: Path, words: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(QplugError, match=sentence) as error:
        quantize(model, tmp_path / "out", **{**AUTO, **words})
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_divergence_that_cannot_be_reached(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "cheapest", lambda *_: None)
    with pytest.raises(QplugError, match=r"--max-kl 0\.001: cannot be reached: the least that"):
        quantize(model, tmp_path / "out", **AUTO, max_kl=0.001)


def test_a_killed_run_keeps_its_choice(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: Contents
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    chosen(whole, model, bits=4.6)
    write = Writer.write

    def stopped(self: Writer, number: int, *args: Any) -> None:
        if number == 5:
            raise KeyboardInterrupt
        write(self, number, *args)

    monkeypatch.setattr(Writer, "write", stopped)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, out, **AUTO, bits=4.6)
    monkeypatch.undo()
    monkeypatch.setattr(choose, "_losses", None)  # it is not called again
    assert chosen(out, model, bits=4.6).resumed == 5
    assert contents(out) == contents(whole)


@pytest.mark.slow
def test_recipes_say_auto_and_jobs_keep_finished_folders(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        f"model: {model}\npipeline: [rtn]\nscheme: auto\nbudget: {{bits: 4.6}}\n"
        f"backend: vllm\ncalibration: {{samples: 2, seq_len: 48}}\n"
        f"export: [{{out: {tmp_path / 'a'}}}, {{out: {tmp_path / 'b'}}}]\n"
    )
    registry = Registry.installed()
    job = read_job(file, registry).job
    assert job.recipe.is_auto
    assert job.recipe.budget.bits == 4.6
    quantize(model, tmp_path / "a", job.recipe)
    searched, losses = [], choose._losses
    monkeypatch.setattr(choose, "_losses", lambda *a: searched.append(1) or losses(*a))
    done = perform(job, registry=registry)
    assert searched == [1]  # the checks before the run do not choose once more
    assert done.kept == (tmp_path / "a",)
    assert [result.out for result in done.results] == [tmp_path / "b"]


def test_a_dry_run_prints_a_table(
    model: str, tmp_path: Path, cli: Callable[..., CliResult]
) -> None:
    words = ["quantize", model, "--out", tmp_path / "out", "--backend", "vllm", "--dry-run"]
    data = ["--samples", 2, "--seq-len", 48]
    lines = cli(*words, *data, "--scheme", "auto", "--bits", 4.6).stdout.splitlines()
    (start,) = (n for n, line in enumerate(lines) if line.startswith("chosen: 4."))
    assert "no choice within the budget is below" in lines[start + 1]
    assert lines[start + 2].split() == ["layers", "scheme", "bits", "divergence"]
    table = lines[start + 3 : start + 3 + 8]  # four groups in each of two blocks
    assert all(line.startswith("model.layers.") for line in table)
    assert not (tmp_path / "out").exists()
    result = json.loads(cli(*words, *data, "--scheme", "auto", "--bits", 4.6, "--json").stdout)
    assert len(result["choice"]["groups"]) == 8


def test_the_solver_is_imported_only_when_there_is_something_to_solve() -> None:
    assert "scipy" not in vars(solver)
