"""A quantized head, in runs with and without data: for vLLM alone."""

from __future__ import annotations

import json
from shutil import copytree
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file, save_file
from spoilt import forget_checksums

import qplug
from qplug import QplugError
from qplug.checkpoint.locate import find_model
from qplug.machine.session import Session
from qplug.reading.folder import open_folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Quantized = Callable[..., Path]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The demo model with a head of its own."""
    out = tmp_path_factory.mktemp("untied") / "demo"
    copytree(find_model("qplug:demo"), out)
    tensors = load_file(out / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return str(out)


HEAD = {"lm_head": "W8A16"}


@pytest.mark.parametrize("algo", ["rtn", "awq"])
def test_a_head_is_a_target_of_its_own(quantized: Quantized, untied: str, algo: str) -> None:
    short = {"awq": {"ratios": 2, "clip": False}} if algo == "awq" else {}
    how = {"backend": "vllm", "overrides": HEAD, "algo": algo, "algorithm_options": short}
    out = quantized("W4A16", model=untied, **how)
    folder = open_folder(str(out), Session.alone())
    assert folder.schemes["lm_head"].name == "W8A16"
    assert "lm_head.weight_packed" in folder.checkpoint.tensors
    config = folder.checkpoint.config["quantization_config"]
    targets = [group["targets"] for group in config["config_groups"].values()]
    assert ["lm_head"] in targets
    assert not config["ignore"]
    assert qplug.verify(str(out)).ok


def test_a_head_is_named_beside_a_class(quantized: Quantized, untied: str) -> None:
    """Where all is of one scheme: a head is no ``Linear`` to vLLM."""
    out = quantized("W8A8", model=untied, backend="vllm", overrides={"lm_head": "W8A8"})
    config = json.loads((out / "config.json").read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    assert group["targets"] == ["Linear", r"re:.*lm_head$"]
    assert qplug.verify(str(out)).ok

    group["targets"] = ["Linear"]
    broken = forget_checksums(copytree(out, out.parent / "broken"))
    (broken / "config.json").write_text(json.dumps(config))
    for backend, release in (("vllm", "vLLM 0.33.0"), ("sglang", "SGLang 0.5.23")):
        (problem,) = qplug.verify(str(broken), backend=backend).problems
        assert str(problem) == (
            f"head: lm_head: is named in no config group: {release} cannot place its codes"
        )


def test_static_inputs_of_a_head_are_not_known(untied: str, tmp_path: Path) -> None:
    with pytest.raises(QplugError, match="lm_head: no token of the calibration data reached it"):
        qplug.quantize(
            untied,
            tmp_path / "out",
            scheme="W8A8",
            backend="vllm",
            overrides={"lm_head": "W8A8_STATIC"},
            samples=2,
            seq_len=16,
        )


@pytest.mark.parametrize(
    "scheme",
    ["W8A16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("W8A8", "FP8_DYNAMIC"))],
)
def test_sglang_takes_a_head(quantized: Quantized, untied: str, scheme: str) -> None:
    out = str(quantized("W4A16", model=untied, backend="sglang", overrides={"lm_head": scheme}))
    assert open_folder(out, Session.alone()).schemes["lm_head"].name == scheme
    assert qplug.verify(out).ok
    problems = qplug.verify(out, engine_version="0.5.16").problems
    assert {problem.where for problem in problems if problem.check == "head"} == {"lm_head"}


def test_an_old_sglang_takes_no_head(untied: str, tmp_path: Path) -> None:
    options = {"backend": "sglang", "backend_options": {"engine": "0.5.16"}}
    with pytest.raises(QplugError, match=r"lm_head: SGLang 0\.5\.16 does not load a head in W8A16"):
        qplug.quantize(untied, tmp_path / "out", overrides=HEAD, **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_scales_of_blocks_do_not_fit_a_vocabulary(untied: str, tmp_path: Path) -> None:
    with pytest.raises(QplugError, match="does not load a head in FP8_BLOCK"):
        qplug.quantize(
            untied, tmp_path / "out", backend="sglang", overrides={"lm_head": "FP8_BLOCK"}
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("backend", ["vllm", "sglang"])
def test_mixed_widths_by_pattern(quantized: Quantized, backend: str) -> None:
    """Both are pack-quantized, and each layer is in just one group."""
    out = quantized("W4A16", backend=backend, overrides={r"re:.*down_proj": "W8A16"})
    folder = open_folder(str(out), Session.alone())
    kinds = {name: scheme.name for name, scheme in folder.schemes.items()}
    assert all((kind == "W8A16") == name.endswith("down_proj") for name, kind in kinds.items())
    config = folder.checkpoint.config["quantization_config"]
    assert config["format"] == "pack-quantized"
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert all(target.startswith("re:") for target in targets)
    assert qplug.verify(str(out)).ok
