"""Files run from end to end on the demo model: folders, measurements, and what is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

import qplug
from qplug import QplugError
from qplug.recipe.files import ReadJob

pytestmark = pytest.mark.slow

Cli = Callable[..., Result]
Llmc = Callable[..., str]
Read = Callable[..., ReadJob]

PILE = "name: pileval\ndownload: False\npath: {}\nn_samples: 4\nbs: -1\nseq_len: 64\n"
PREPROC = "preproc: txt_general_preproc\nseed: *seed\n"
MODEL = "type: model_type\npath: {}\ntokenizer_mode: slow\ntorch_dtype: auto\n"
AWQ = "trans: True\ntrans_version: v2\nweight_clip: False\n"
EVAL = "eval_pos: [{}]\nname: wikitext2\ndownload: False\npath: {}\nseq_len: 64\nbs: 1\n"
INT8 = "{bit: 8, symmetric: True, granularity: per_channel, group_size: -1}"
TOKEN8 = "{bit: 8, symmetric: True, granularity: per_token}"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(f"The {n}th line of a text is about {n * n}." for n in range(120)))
    return file


@pytest.fixture
def run(cli: Cli, tmp_path: Path) -> Callable[..., Result]:
    """``run(text, "--dry-run")``: a file with this text is run."""

    def run_file(told: str, *words: object) -> Result:
        (tmp_path / "f.yml").write_text(told)
        return cli("quantize", "--config", tmp_path / "f.yml", "--device", "cpu", *words)

    return run_file


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def awq(llmc: Llmc, text: Path, tmp_path: Path, **parts: str) -> str:
    told: dict[str, Any] = {
        "method": "Awq",
        "model": MODEL.format("qplug:demo"),
        "calib": PILE.format(text) + PREPROC,
        "special": AWQ,
        "quant": "quant_out: True",
        "save": f"save_sgl: True\nsave_path: {tmp_path}/saved/awq_w4/",
    }
    return llmc(**{**told, **parts})


def test_awq_w4a16(
    run: Callable[..., Result], llmc: Llmc, text: Path, tmp_path: Path, cli: Cli
) -> None:
    """The folder lies at save_path itself, and is what the command line makes."""
    result = run(awq(llmc, text, tmp_path))
    assert result.exit_code == 0, result.output
    out = tmp_path / "saved/awq_w4"
    assert "Warning: " in result.stderr  # one text has no documents to choose from
    assert result.stdout.startswith(f"{out}: 28 layers")
    assert left(tmp_path / "saved") == {"awq_w4"}
    options = {"awq": {"clip": False}}
    qplug.quantize(
        "qplug:demo",
        tmp_path / "python",
        algo="awq",
        algorithm_options={"awq": {**options["awq"], "scale": True, "version": "v2"}},
        dataset="text",
        dataset_options={"path": text},
        samples=4,
        seq_len=64,
        seed=42,
        device="cpu",
    )
    name = "model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "python" / name).read_bytes()
    again = run(awq(llmc, text, tmp_path))
    assert again.exit_code == 1
    assert f"Error: {out}: exists; choose another folder, or pass --overwrite" in again.output


def test_fp8_dynamic_needs_no_data(
    run: Callable[..., Result], llmc: Llmc, tmp_path: Path, text: Path, cli: Cli
) -> None:
    """LLMC itself fails on this after its weights are written."""
    args = (
        "{quant_type: float-quant, bit: e4m3, symmetric: True, granularity: %s, use_qtorch: True}"
    )
    told = llmc(
        weight=args % "per_channel",
        act=args % "per_token",
        model=MODEL.format("qplug:demo"),
        evaluate=EVAL.format("fake_quant", text),
        save=f"save_vllm: True\nsave_path: {tmp_path}/fp8",
    )
    result = run(told, "--json")
    assert result.exit_code == 0, result.output
    assert "Warning: " not in result.stderr
    found = json.loads(result.stdout)
    (measured,) = found["measured"]
    assert (measured["at"], measured["model"]) == ("quantized", f"{tmp_path}/fp8")
    assert found["results"][0]["out"] == f"{tmp_path}/fp8"
    same = qplug.evaluate(
        f"{tmp_path}/fp8",
        dataset="text",
        dataset_options={"path": text},
        seq_len=64,
        windows=None,
        device="cpu",
    )
    assert measured["perplexity"] == same.perplexity
    assert cli("verify", tmp_path / "fp8").exit_code == 0


def test_two_steps(
    run: Callable[..., Result], llmc: Llmc, text: Path, tmp_path: Path, cli: Cli
) -> None:
    """Step 1 writes save_path/transformed_model, which step 2 reads; one recipe does as well."""
    parts = {"weight": INT8, "act": TOKEN8, "calib": PILE.format(text) + PREPROC}
    step_1 = llmc(
        method="SmoothQuant",
        model=MODEL.format("qplug:demo"),
        save=f"save_trans: True\nsave_path: {tmp_path}/one",
        **parts,
    )
    step_2 = llmc(
        method="GPTQ",
        special="actorder: True\nstatic_groups: True\npercdamp: 0.01\nblocksize: 128\n",
        quant="quant_out: True",
        model=MODEL.format(f"{tmp_path}/one/transformed_model"),
        save=f"save_sgl: True\nsave_path: {tmp_path}/two",
        **parts,
    )
    assert run(step_1).exit_code == 0
    assert left(tmp_path / "one") == {"transformed_model"}
    result = run(step_2)
    assert result.exit_code == 0, result.output
    assert cli("verify", tmp_path / "two").exit_code == 0
    manifest = json.loads((tmp_path / "two/qplug.json").read_text())
    assert manifest["recipe"]["algorithms"] == ["gptq"]
    data = {"dataset": "text", "dataset_options": {"path": text}, "seq_len": 64, "device": "cpu"}
    in_one = qplug.quantize(
        "qplug:demo",
        tmp_path / "whole",
        algo="smoothquant+gptq",
        scheme="W8A8",
        samples=4,
        seed=42,
        algorithm_options={"gptq": {"damp": 0.01}},
        **data,
    )
    losses = json.loads((tmp_path / "two/qplug.json").read_text())["layers"]
    mean = sum(layer["loss"] for layer in losses.values()) / len(losses)
    whole = sum(in_one.losses.values()) / len(in_one.losses)
    assert abs(mean / whole - 1) < 0.05
    two, one = (qplug.evaluate(str(tmp_path / f), **data).perplexity for f in ("two", "whole"))
    assert abs(two / one - 1) < 0.01


def test_every_stage_is_measured_and_nothing_else_is_left(
    run: Callable[..., Result], llmc: Llmc, text: Path, tmp_path: Path
) -> None:
    stages = "pretrain, transformed, fake_quant"
    told = awq(llmc, text, tmp_path, evaluate=EVAL.format(stages, text), save="save_trans: False")
    before = left(tmp_path)
    result = run(told, "--json", "--override", "*.down_proj=W2A16")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["results"] == []
    perplexity = {told["at"]: told["perplexity"] for told in found["measured"]}
    assert list(perplexity) == ["pretrain", "transformed", "quantized"]
    assert abs(perplexity["transformed"] / perplexity["pretrain"] - 1) < 0.02
    assert perplexity["quantized"] > 1.2 * perplexity["pretrain"]
    assert left(tmp_path) == before | {"f.yml"}
    assert not [path for path in Path.cwd().iterdir() if path.name.startswith(".qplug")]


def test_a_job_that_was_stopped_keeps_what_it_wrote(
    run: Callable[..., Result], llmc: Llmc, text: Path, tmp_path: Path
) -> None:
    told = awq(
        llmc, text, tmp_path, save=f"save_trans: True\nsave_vllm: True\nsave_path: {tmp_path}/a"
    )
    assert run(told).exit_code == 0
    assert "transformed_model" in left(tmp_path / "a")
    whole = (tmp_path / "a/transformed_model/model.safetensors").read_bytes()
    first = (tmp_path / "a/model.safetensors").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "a/transformed_model")
    result = run(told)
    assert result.exit_code == 0, result.output
    assert f"{tmp_path}/a: was written by an earlier run" in result.stdout
    assert (tmp_path / "a/transformed_model/model.safetensors").read_bytes() == whole
    assert (tmp_path / "a/model.safetensors").stat().st_mtime_ns == first
    shutil.rmtree(tmp_path / "a/transformed_model")
    other = run(told, "--samples", 5)  # not this job's
    assert other.exit_code == 1
    assert f"{tmp_path}/a: exists" in other.output


def complaint(result: Result) -> str:
    """What a command says after it has said what it opens."""
    return result.output[max(0, result.output.find("Error: ")) :]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"save": "save_sgl: True\nsave_path: x", "model": MODEL.format("nowhere/at/all")},
            "no such",
        ),
        ({"evaluate": EVAL.format("fake_quant", "nowhere")}, "nowhere"),
        ({"evaluate": EVAL.format("pretrain", "{text}").replace("64", "4096")}, "--seq-len 4096"),
        ({"calib": PILE.format("nowhere") + PREPROC}, "nowhere"),
        ({"more": "ignored_layers: {speical_names: [model.no.such]}\n"}, "--ignore model.no.such"),
        ({"quant": "kvcache: {method: Naive, bit: 9}"}, "quant.kvcache.bit: 9 is wrong"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(
    run: Callable[..., Result],
    llmc: Llmc,
    text: Path,
    tmp_path: Path,
    change: dict[str, str],
    complaint: str,
) -> None:
    change = {key: value.replace("{text}", str(text)) for key, value in change.items()}
    before = left(tmp_path)
    result = run(awq(llmc, text, tmp_path, **change))
    assert result.exit_code == 1
    kinds = ("opening ", "Warning: ")
    lines = [line for line in result.stderr.splitlines() if not line.startswith(kinds)]
    assert len(lines) == 1
    assert lines[0].startswith("Error: ")
    assert complaint in lines[0]
    assert result.stdout == ""
    assert left(tmp_path) == before | {"f.yml"}


def test_a_dry_run(run: Callable[..., Result], llmc: Llmc, text: Path, tmp_path: Path) -> None:
    told = awq(llmc, text, tmp_path, evaluate=EVAL.format("transformed", text))
    before = left(tmp_path)
    result = run(told, "--dry-run")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{tmp_path}/saved/awq_w4: would be written: ")
    assert left(tmp_path) == before | {"f.yml"}


def test_a_folder_of_the_users_with_a_hidden_name_stays(
    run: Callable[..., Result], llmc: Llmc, text: Path, tmp_path: Path
) -> None:
    told = awq(llmc, text, tmp_path, evaluate=EVAL.format("transformed", text))
    thesis = tmp_path / "saved" / ".awq_w4.transformed" / "thesis.tex"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work")
    result = run(told)
    assert result.exit_code == 1
    assert ".awq_w4.transformed: is not a folder that qplug wrote" in result.stderr
    assert thesis.read_text() == "years of work"


def test_a_snippet_with_the_rest_on_the_command_line(
    run: Callable[..., Result], llmc: Llmc, tmp_path: Path, cli: Cli
) -> None:
    snippet = llmc()
    nothing = run(snippet)
    assert "the job names no model: give MODEL" in nothing.output
    assert "the job writes and measures nothing: give --out" in run(snippet, "qplug:demo").output
    result = run(snippet, "qplug:demo", "--out", tmp_path / "out", "--group-size", "64")
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == 64


def test_a_native_recipe(run: Callable[..., Result], tmp_path: Path, cli: Cli) -> None:
    told = f"""
model: qplug:demo
pipeline: [rtn]
scheme: {{weights: {{dtype: int4, strategy: group, group_size: 32}}}}
overrides: [{{pattern: "*.down_proj", scheme: {{preset: W4A16, group_size: 64}}}}]
ignore: ["*.0.self_attn.o_proj"]
export: [{{out: "{tmp_path}/x/y", backend: compressed-tensors}}]
eval: [{{at: [quantized], seq_len: 64, windows: 2}}]
"""
    result = run(told)
    assert result.exit_code == 0, result.output
    assert "quantized: perplexity" in result.stdout
    assert "(2 windows of 64 tokens of demo)" in result.stdout
    manifest = json.loads((tmp_path / "x/y/qplug.json").read_text())
    sizes = {scheme["weights"]["group_size"] for scheme in manifest["schemes"]}
    assert sizes == {32, 64}
    assert "model.layers.0.self_attn.o_proj" not in manifest["layers"]


def test_python(read_text: Read, tmp_path: Path) -> None:
    job = replace(
        read_text("pipeline: [rtn]\n").job,
        model="qplug:demo",
        exports=(qplug.Export(tmp_path / "out"),),
    )
    steps: list[str] = []
    done = qplug.perform(job, device="cpu", watch=lambda what, *_: steps.append(what))
    assert done.results[0].out == tmp_path / "out"
    assert set(steps) == {"quantizing"}
    with pytest.raises(QplugError, match="exists"):
        qplug.perform(job, device="cpu")


def test_config_check(cli: Cli, llmc: Llmc, tmp_path: Path, text: Path) -> None:
    file = tmp_path / "f.yml"
    file.write_text(awq(llmc, text, tmp_path, special=AWQ + "save_clip: True\n"))
    result = cli("config", "check", file)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{file}: valid LLMC file: awq, W4A16; writes ")
    assert f"Warning: {file}:24: quant.special.save_clip: no effect" in result.stderr
    file.write_text("scheme: W1A1\n")
    wrong = cli("config", "check", file)
    assert wrong.exit_code == 1
    assert f"Error: {file}:1: scheme: no scheme 'W1A1'" in wrong.stderr
    assert cli("config", "check", tmp_path / "none.yml").exit_code == 1


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ("pipeline: [rtn, gptq]", "2: pipeline: rtn and gptq both choose codes"),
        ("pipeline: [smoothquant, awq]\nscheme: W8A8", "2: pipeline: --algo smoothquant+awq: "),
        ("pipeline: [awq, quarot]", "2: pipeline: --algo awq+quarot: quarot rewrites the float"),
        ("pipeline: [smoothquant]", "2: pipeline: smoothquant: makes inputs easy to round, but"),
    ],
)
def test_pipelines_that_make_no_sense(
    run: Callable[..., Result], cli: Cli, told: str, sentence: str, tmp_path: Path
) -> None:
    """Checked or run, the same line."""
    out = tmp_path / "out"
    said = run(f"model: qplug:demo\n{told}\nexport: [{{out: {out}}}]\n")
    assert said.exit_code == 1
    assert complaint(said).startswith(f"Error: {tmp_path}/f.yml:{sentence}")
    checked = cli("config", "check", tmp_path / "f.yml")
    assert (checked.exit_code, checked.output) == (1, complaint(said))
    assert left(tmp_path) == {"f.yml"}


def test_pipelines_of_llmc_that_make_no_sense(
    run: Callable[..., Result], cli: Cli, llmc: Llmc, tmp_path: Path
) -> None:
    told = llmc(method="OsPlus", calib="name: c4\ndownload: True")
    (tmp_path / "f.yml").write_text(told)
    checked = cli("config", "check", tmp_path / "f.yml")
    assert checked.exit_code == 1
    where = f"{tmp_path}/f.yml:7: quant.method"
    assert checked.output.startswith(f"Error: {where}: osplus: makes inputs easy to round, but W4A")
    # Beside another scheme it makes sense: the command line has its say first.
    words = ("qplug:demo", "--out", tmp_path / "out", "--dataset", "demo", "--dry-run")
    assert run(told, *words, "--scheme", "W8A8").exit_code == 0
    assert complaint(run(told, *words)) == checked.output


def test_steps_that_rotate_as_the_model_runs(
    run: Callable[..., Result], llmc: Llmc, text: Path, tmp_path: Path
) -> None:
    """What step 1 leaves to be rotated is rotated in step 2, and wherever it is measured."""
    int4 = "{bit: 4, symmetric: False, granularity: per_%s}"
    parts = {"weight": int4 % "channel", "act": int4 % "token"}
    rotate = "rotate_mode: hadamard\nfp32_had: True\nonline_rotate: True"
    gptq = "actorder: True\nstatic_groups: True\npercdamp: 0.01\nblocksize: 128\n"
    evaluate = EVAL.format("{}", text) + "inference_per_block: False"
    step_1 = llmc(
        method="Quarot",
        special=rotate,
        model=MODEL.format("qplug:demo"),
        evaluate=evaluate.format("pretrain, transformed"),
        save=f"save_trans: True\nsave_path: {tmp_path}/one",
        **parts,
    )
    step_2 = llmc(
        method="GPTQ",
        special=gptq + "online_rotate: True",
        quant="quant_out: True",
        calib=PILE.format(text) + PREPROC,
        model=MODEL.format(f"{tmp_path}/one/transformed_model"),
        evaluate=evaluate.format("pretrain, fake_quant"),
        save=f"save_fake: True\nsave_path: {tmp_path}/two",
        **parts,
    )
    measured = {}
    for step in (step_1, step_2):
        result = run(step, "--json")
        assert result.exit_code == 0, result.output
        for told in json.loads(result.stdout)["measured"]:
            measured.setdefault(told["at"], []).append(told["perplexity"])
    first, second = measured["pretrain"]
    assert abs(measured["transformed"][0] / first - 1) < 0.01  # the weights are bfloat16
    assert second == measured["transformed"][0]
    assert measured["quantized"][0] < 2 * first
    manifest = json.loads((tmp_path / "two/fake_quant_model/qplug.json").read_text())
    assert manifest["online"] == [f"model.layers.{n}.mlp.down_proj" for n in range(4)]
    served = step_2.replace("save_fake", "save_vllm")
    refused = run(served, "--out", tmp_path / "three", "--scheme", "W8A8")
    assert "vllm: does not rotate inputs of linears while the model runs" in refused.stderr
    again = run(step_1, f"{tmp_path}/one/transformed_model", "--out", tmp_path / "three")
    assert "are rotated while the model runs, so quarot cannot rewrite it" in again.stderr


def test_help(cli: Cli) -> None:
    assert "config" in cli("--help").output
    assert "--config" in cli("quantize", "--help").output
    for name in ("check", "convert", "schema"):
        assert name in cli("config", "--help").output
    missing = cli("quantize", "--out", "x")
    assert missing.exit_code == 2
    assert "Missing MODEL: give MODEL, or a recipe with --config" in missing.output
