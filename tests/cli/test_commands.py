"""The commands that work on models, as they are typed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file, save_file
from spoilt import forget_checksums

import qplug
from qplug import PRESETS
from qplug.checkpoint.open import SINGLE
from qplug.output.checksums import sealed
from qplug.output.manifest import MANIFEST
from qplug.registry.registry import Registry

if TYPE_CHECKING:
    import torch
    from click.testing import Result

    Cli = Callable[..., Result]
    Contents = Callable[[Path], dict[str, bytes | None]]


@pytest.fixture(scope="session")
def pristine_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "demo-w4a16"
    qplug.quantize("qplug:demo", out)
    return out


@pytest.fixture
def demo(pristine_demo: Path, tmp_path: Path) -> Path:
    """The demo model in W4A16 for sglang, in a folder that a test may change."""
    return Path(shutil.copytree(pristine_demo, tmp_path / "demo"))


# --- quantize ------------------------------------------------------------------------------------


def test_quantize(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = cli("quantize", "qplug:demo", "--algo", "rtn", "--out", out)
    assert result.exit_code == 0
    opening, plan = result.stderr.splitlines()
    assert opening == "opening qplug:demo"
    assert plan.startswith(
        "qplug:demo (LlamaForCausalLM, 4.2 million parameters, 4 blocks) becomes W4A16 by rtn for "
        "sglang: 8.4 MB -> 3.7 MB. No calibration data is needed. On the CPU ("
    )
    first, second, *following = result.stdout.splitlines()
    assert first.startswith(f"{out}: 28 layers, 8.4 MB -> 3.7 MB, ")
    assert first.endswith(" s")
    assert second.startswith("weights of layers were rounded by 11.1% on average, 11.")
    commands = [f"next: qplug verify {out}", f"qplug serve {out}", f"qplug report {out}"]
    assert [line.strip() for line in following] == commands


def test_quantize_json(cli: Cli, tmp_path: Path) -> None:
    words = ("--algo", "rtn", "--out", tmp_path / "out", "--json")
    result = cli("quantize", "qplug:demo", *words)
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    held = load_file(tmp_path / "out" / SINGLE)
    assert told["out"] == str(tmp_path / "out")
    assert told["bytes"] == sum(tensor.nbytes for tensor in held.values())
    assert len(told["errors"]) == 28
    assert (told["resumed"], told["dry_run"]) == (0, False)
    assert told["seconds"] > 0


def test_every_option_of_quantize(cli: Cli, llama: Path, tmp_path: Path) -> None:
    words = ["--algo", "rtn", "--scheme", "w8a16", "--backend", "vllm", "--group-size", 64]
    words += ["--ignore", "*.1.mlp.*", "--ignore", "*o_proj", "--override", "*.0.mlp.*=W4A16_ASYM"]
    words += ["--shard-size", "0.0001", "--seed", 5, "--device", "cpu"]
    result = cli("quantize", "--algo", "rtn", llama, "--out", tmp_path / "out", *words, "--json")
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "out" / "qplug.json").read_text())
    assert manifest["recipe"]["seed"] == 5
    assert manifest["recipe"]["backend"] == "vllm"
    kinds = {
        name: (manifest["schemes"][layer["scheme"]]["name"],
               manifest["schemes"][layer["scheme"]]["weights"]["group_size"])
        for name, layer in manifest["layers"].items()
    }  # fmt: skip
    attention = [f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qkv"]
    mlp = [f"model.layers.0.mlp.{local}_proj" for local in ("gate", "up", "down")]
    assert kinds == {
        **dict.fromkeys(attention, ("W8A16", 64)),
        **dict.fromkeys(mlp, ("W4A16_ASYM", 128)),
    }
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_dry_run(cli: Cli, llama: Path, tmp_path: Path, contents: Contents) -> None:
    before = contents(tmp_path)
    words = (
        "quantize",
        "--algo",
        "rtn",
        llama,
        "--out",
        tmp_path / "out",
        "--shard-size",
        "0.0001",
    )
    said = cli(*words, "--dry-run")
    told = json.loads(cli(*words, "--dry-run", "--json").stdout)
    assert contents(tmp_path) == before
    first, estimated = said.stdout.splitlines()
    assert first == f"{tmp_path / 'out'}: would be written: 0.6 MB -> 0.2 MB"
    assert " it takes about " in estimated
    assert told["plan"]["estimate"]["disk"] == told["bytes"]
    assert told["dry_run"] is True
    done = json.loads(cli(*words, "--json").stdout)
    assert {key: told[key] for key in ("bytes", "source_bytes")} == {
        key: done[key] for key in ("bytes", "source_bytes")
    }
    held = [load_file(path) for path in (tmp_path / "out").glob("*.safetensors")]
    assert told["bytes"] == sum(tensor.nbytes for part in held for tensor in part.values())


def test_a_resumed_run_says_so(
    cli: Cli, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qplug.output.writer import Writer

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    words = ("--algo", "rtn", "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "finish", interrupt)
        stopped = cli("quantize", llama, *words)
        assert stopped.exit_code == 1
    said = stopped.stderr.splitlines()[2]
    assert said == (
        f"{tmp_path / 'out'}: 2 of 2 blocks are kept; the same command goes on after them."
    )
    result = cli("quantize", llama, *words)
    assert result.stderr.splitlines()[-1] == (
        "going on: 2 of 2 blocks were kept from an earlier run"
    )
    assert result.stdout.splitlines()[0].endswith(" s, 2 of 2 blocks kept from an earlier run")


def test_ctrl_c_before_the_first_step(
    cli: Cli, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qplug.run.written.fingerprint", interrupt)
    stopped = cli("quantize", llama, "--algo", "rtn", "--out", tmp_path / "a" / "out")
    assert stopped.stderr.splitlines()[1] == (
        "No step was finished; the same command starts again."
    )
    assert not (tmp_path / "a").exists()


def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    """What libraries print would be seen too."""
    command = [sys.executable, "-m", "qplug", "quantize", "qplug:demo", "--out", "out"]
    command += ["--algo", "rtn"]
    done = subprocess.run(
        [*command, "--json"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert [line.partition(" ")[0] for line in done.stderr.splitlines()[:2]] == [
        "opening",
        "qplug:demo",
    ]
    assert json.loads(done.stdout)["out"] == "out"
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert refused.stderr == (
        "opening qplug:demo\nError: out: exists; choose another folder, or pass --overwrite\n"
    )
    assert refused.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- verify --------------------------------------------------------------------------------------


def test_verify(cli: Cli, demo: Path, contents: Contents) -> None:
    before = contents(demo)
    result = cli("verify", demo)
    assert (result.exit_code, result.stderr) == (0, "")
    first, rules, second = result.stdout.splitlines()
    assert first == "sound: 28 quantized layers, as sglang loads them"
    assert rules == "rules of SGLang 0.5.23: the newest that qplug knows"
    assert second.startswith("relative error against qplug:demo: mean 0.11")
    assert contents(demo) == before


def test_verify_json(cli: Cli, demo: Path) -> None:
    told = json.loads(cli("verify", demo, "--json").stdout)
    assert told["ok"] is True
    assert (told["folder"], told["backend"], told["against"]) == (str(demo), "sglang", "qplug:demo")
    assert (told["linears"], told["problems"], len(told["errors"])) == (28, [], 28)
    assert told["engine"] is None
    assert told["rules"] == "rules of SGLang 0.5.23: the newest that qplug knows"


def test_verify_by_other_rules(cli: Cli, demo: Path) -> None:
    told = cli("verify", demo, "--backend", "vllm").stdout
    assert told.startswith("sound: 28 quantized layers, as vllm loads them\nrules of vLLM 0.33.0: ")


def test_verify_by_the_rules_of_a_version(cli: Cli, demo: Path) -> None:
    told = cli("verify", demo, "--engine-version", "0.5.16").stdout
    assert told.splitlines()[1] == "rules of SGLang 0.5.16: asked for"
    unknown = cli("verify", demo, "--engine-version", "0.4")
    assert (unknown.exit_code, unknown.stdout) == (1, "")
    assert unknown.stderr == (
        "Error: no table for version '0.4' of the engine; there are: SGLang 0.5.23, SGLang 0.5.16\n"
    )
    bare = cli("verify", demo, "--backend", "compressed-tensors", "--engine-version", "0.5")
    assert "the engine of compressed-tensors has no versions to choose from" in bare.stderr


def test_verify_without_the_float_model(cli: Cli, demo: Path, tmp_path: Path) -> None:
    edit_json(demo / "qplug.json", lambda told: told.update(model=str(tmp_path / "gone")))
    result = cli("verify", demo)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[2].startswith("not compared: ")
    against = cli("verify", demo, "--against", "qplug:demo")
    assert "relative error against qplug:demo" in against.stdout
    assert cli("verify", demo, "--against", tmp_path / "gone").exit_code == 1


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    held = json.loads(path.read_text())
    change(held)
    path.write_text(json.dumps(sealed(held) if path.name == MANIFEST else held))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    held = load_file(folder / SINGLE)
    change(held)
    save_file(held, folder / SINGLE, {"format": "pt"})
    forget_checksums(folder)


UP = "model.layers.2.mlp.up_proj"


def damage_scale(folder: Path) -> str:
    edit_tensors(folder, lambda held: held[f"{UP}.weight_scale"][0].fill_(float("nan")))
    return f"scale: {UP}"


def damage_codes(folder: Path) -> str:
    def swap(held: dict[str, torch.Tensor]) -> None:
        held[f"{UP}.weight_packed"] = held[f"{UP}.weight_packed"].flip(0).contiguous()

    edit_tensors(folder, swap)
    return f"error: {UP}"


def damage_norm(folder: Path) -> str:
    edit_tensors(folder, lambda held: held["model.norm.weight"].mul_(2))
    return "changed: model.norm.weight"


def lose_codes(folder: Path) -> str:
    edit_tensors(folder, lambda held: held.pop(f"{UP}.weight_packed"))
    return f"missing: {UP}"


def lose_norm(folder: Path) -> str:
    edit_tensors(folder, lambda held: held.pop("model.layers.1.input_layernorm.weight"))
    return "missing: model.layers.1.input_layernorm.weight"


def lose_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    return "tokenizer: "


def lose_ignore(folder: Path) -> str:
    edit_json(
        folder / "config.json", lambda config: config["quantization_config"].update(ignore=[])
    )
    return "ignore: lm_head"


def other_bits(folder: Path) -> str:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 8

    edit_json(folder / "config.json", change)
    return "shape: model.layers.0"


def other_format(folder: Path) -> str:
    edit_json(
        folder / "config.json",
        lambda config: config["quantization_config"].update(format="int-quantized"),
    )
    return "format: "


DAMAGES = [
    *(damage_scale, damage_codes, damage_norm, lose_codes, lose_norm, lose_tokenizer),
    *(lose_ignore, other_bits, other_format),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_verify_finds(damage: Callable[[Path], str], cli: Cli, demo: Path) -> None:
    told = damage(demo)
    result = cli("verify", demo)
    assert result.exit_code == 1
    for start in (told, "not sound: "):
        assert any(line.startswith(start) for line in result.stdout.splitlines()), result.stdout
    plain = json.loads(cli("verify", demo, "--json").stdout)
    assert plain["ok"] is False
    assert any(told.startswith(problem["check"]) for problem in plain["problems"])


@pytest.mark.parametrize("cut", [1, 1000, 10**6])
def test_verify_a_truncated_file(cut: int, cli: Cli, demo: Path) -> None:
    data = (demo / SINGLE).read_bytes()
    (demo / SINGLE).write_bytes(data[:-cut])
    result = cli("verify", demo)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {demo / SINGLE}: cut short: ")
    assert result.stdout == ""


def test_many_problems_are_not_all_listed(cli: Cli, demo: Path) -> None:
    def lose(held: dict[str, torch.Tensor]) -> None:
        for name in [name for name in held if name.endswith("weight_scale")]:
            del held[name]

    edit_tensors(demo, lose)
    result = cli("verify", demo)
    lines = result.stdout.splitlines()
    assert len(lines) == 24
    assert lines[20] == f"... and {28 - 20} more problems"
    assert len(json.loads(cli("verify", demo, "--json").stdout)["problems"]) == 28


def test_verify_another_model(cli: Cli, demo: Path, llama: Path) -> None:
    result = cli("verify", demo, "--against", llama)
    assert result.exit_code == 1
    assert result.stderr or "not sound" in result.stdout


@pytest.mark.parametrize("folder", ["qplug:demo", "nowhere"])
def test_nothing_to_verify(folder: str, cli: Cli) -> None:
    result = cli("verify", folder)
    assert result.exit_code == 1
    complaint = "no such folder" if folder == "nowhere" else "is not quantized"
    assert complaint in result.stderr
    assert len(result.stderr.splitlines()) == 1


# --- inspect -------------------------------------------------------------------------------------


def test_inspect(cli: Cli, demo: Path, contents: Contents) -> None:
    before = contents(demo)
    told = json.loads(cli("inspect", demo, "--json").stdout)
    held = load_file(demo / SINGLE)
    assert told["folder"] == str(demo)
    assert told["architecture"] == "LlamaForCausalLM"
    assert (told["backend"], told["recipe"], told["source"]) == ("sglang", "rtn", "qplug:demo")
    assert told["bytes"] == sum(tensor.nbytes for tensor in held.values())
    assert told["schemes"] == {"W4A16": 28}
    assert (told["float linears"], told.pop("stays float")) == ([], {})
    # 4 bits, 16 for the scale of 128, and 128 for the shape of each.
    assert 4.125 <= told["bits per linear weight"] < 4.13
    assert told["versions"]["qplug"] == qplug.__version__
    lines = cli("inspect", demo).stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(told)
    assert "schemes: W4A16 28" in lines
    assert contents(demo) == before


def test_inspect_a_float_model(cli: Cli) -> None:
    told = json.loads(cli("inspect", "qplug:demo", "--json").stdout)
    assert (told["backend"], told["recipe"], told["schemes"]) == (None, None, {})
    assert told["bits per linear weight"] == 16
    assert len(told["float linears"]) == 28
    lines = cli("inspect", "qplug:demo").stdout.splitlines()
    assert "backend: none" in lines
    assert any(line.startswith("float linears: 28: model.layers.0.") for line in lines)


def test_inspect_what_is_not_there(cli: Cli) -> None:
    result = cli("inspect", "./nowhere")
    assert (result.exit_code, result.stderr) == (1, "Error: ./nowhere: no such folder\n")


# --- schemes -------------------------------------------------------------------------------------


def test_schemes(cli: Cli) -> None:
    result = cli("schemes", "--backend", "sglang")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == list(PRESETS)
    assert any(line.startswith("  sglang ") and "Marlin" in line for line in lines)


def test_one_scheme(cli: Cli) -> None:
    lines = cli("schemes", "int4").stdout.splitlines()
    assert lines[0] == "W4A16        int4, a scale each group of 128, weights"
    assert {line.split()[0] for line in lines[1:]} == {"gptq", "sglang", "vllm"}
    wrong = cli("schemes", "W4A61")
    assert (wrong.exit_code, wrong.stdout) == (1, "")
    assert "Did you mean 'W4A16'?" in wrong.stderr
    assert "no engine serves it; measure it with" in cli("schemes", "W4A4").stderr
    told = json.loads(cli("schemes", "FP8", "--json").stdout)["backends"]
    assert {row["scheme"] for rows in told.values() for row in rows} == {"FP8"}


def test_schemes_of_one_backend(cli: Cli) -> None:
    lines = cli("schemes", "--backend", "vllm").stdout.splitlines()
    rows = [line for line in lines if line.startswith(" ")]
    assert rows
    assert all(row.startswith("  vllm ") for row in rows)
    for row in rows:
        assert " vLLM 0." in row
    result = cli("schemes", "--backend", "vlm")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: no backend 'vlm'. Did you mean 'vllm'?")


def test_schemes_json(cli: Cli) -> None:
    told = json.loads(cli("schemes", "--json").stdout)
    assert told["schemes"] == {name: scheme.to_dict() for name, scheme in PRESETS.items()}
    assert set(told["backends"]) == set(Registry.installed().exporters)
    for backend, rows in told["backends"].items():
        for row in rows:
            assert row["scheme"] in PRESETS, backend
            assert row["kernel"]
            assert row["evidence"]


def test_schemes_on_one_device(cli: Cli) -> None:
    told = json.loads(cli("schemes", "--gpu", "sm90", "--json").stdout)["backends"]
    assert {row["scheme"] for row in told["vllm"]} == {row["scheme"] for row in told["sglang"]}
    assert all("sm90" in row["devices"] for rows in told.values() for row in rows)
    lines = cli("schemes", "--gpu", "cpu", "--backend", "vllm").stdout.splitlines()
    assert any("no: the CPU's kernel takes weights of 4 bits alone" in line for line in lines)


def test_schemes_of_one_release(cli: Cli) -> None:
    words = ("schemes", "--backend", "vllm", "--json", "--engine-version")
    rows = json.loads(cli(*words, "0.26").stdout)["backends"]["vllm"]
    assert {row["engine"] for row in rows} == {"vLLM 0.26.0"}
    newest = json.loads(cli(*words[:-1]).stdout)["backends"]["vllm"]
    assert {row["engine"] for row in newest} == {"vLLM 0.33.0", "vLLM 0.32.0"}  # one for CPUs
    known = "vLLM 0.33.0, vLLM 0.32.0, vLLM 0.26.0"
    sentence = f"no table for version '0.1' of the engine; there are: {known}"
    assert sentence in cli(*words, "0.1").stderr
    assert "name its backend with --backend" in cli("schemes", "--engine-version", "0.26").stderr


def test_schemes_that_take_a_model_in_parts(cli: Cli) -> None:
    words = ("schemes", "--gpu", "sm90", "--backend", "sglang", "--model", "qplug:demo", "--json")
    whole, parts = (
        {row["scheme"]: row.get("problem") for row in json.loads(told.stdout)["backends"]["sglang"]}
        for told in (cli(*words), cli(*words, "--tp", 2))
    )
    assert whole["FP8_BLOCK"] is None
    assert parts["W4A16"] is None
    assert parts["FP8_BLOCK"] == (
        "not this model: model.layers.0.self_attn.k_proj: Triton or DeepGEMM fp8 needs "
        "out_features in multiples of 128, not 64 in each of 2 processes"
    )
    text = cli(*words[:-1], "--tp", 2).stdout
    assert "takes the model" in text
    assert parts["FP8_BLOCK"] in text
    assert cli("schemes", "--tp", 2).stderr == (
        "Error: --tp splits a model over processes: name the model with --model\n"
    )


def test_what_the_table_serves_is_not_refused(cli: Cli, tmp_path: Path) -> None:
    """And what it does not serve is: the table is what the exporter goes by."""
    told = json.loads(cli("schemes", "--json").stdout)["backends"]
    for backend in ("sglang", "vllm", "gptq", "awq"):
        served = {
            row["scheme"]
            for row in told[backend]
            if row["served"] and "experts alone" not in row["kernel"]  # this model has none
        }
        assert served
        for scheme in PRESETS:
            words = ("--scheme", scheme, "--backend", backend, "--samples", 4, "--dry-run")
            result = cli(
                "quantize", "--algo", "rtn", "qplug:demo", "--out", tmp_path / "out", *words
            )
            assert (result.exit_code == 0) == (scheme in served), (backend, scheme)
