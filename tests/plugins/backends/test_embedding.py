"""A quantized embedding: for vLLM, read and verified, and refused where it is not looked up."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree
from typing import TYPE_CHECKING, Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils import match_named_modules
from safetensors.torch import load_file, save_file
from spoilt import forget_checksums

import qplug
from qplug import QplugError, Registry, open_checkpoint
from qplug.checkpoint.locate import find_model
from qplug.machine.session import Session
from qplug.reading.folder import open_folder

if TYPE_CHECKING:
    from collections.abc import Callable

    Quantized = Callable[..., Path]

NAME = "model.embed_tokens"


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The demo model with a head of its own."""
    return str(edited(tmp_path_factory.mktemp("untied") / "demo"))


def edited(out: Path, **config: Any) -> Path:
    """Writes the demo model with a head of its own, and with other fields in config.json."""
    copytree(find_model("qplug:demo"), out)
    tensors = load_file(out / "model.safetensors")
    tensors["lm_head.weight"] = 2 * tensors["model.embed_tokens.weight"]
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    told = json.loads((out / "config.json").read_text())
    told |= {"tie_word_embeddings": False, **config}
    (out / "config.json").write_text(json.dumps(told))
    return out


@pytest.mark.parametrize("algo", ["rtn", "gptq"])
@pytest.mark.parametrize(("scheme", "of_embedding"), [("W4A16", "W8A16"), ("W4A16", "W4A16")])
def test_it_is_written_read_and_verified(
    quantized: Quantized, untied: str, algo: str, scheme: str, of_embedding: str
) -> None:
    out = quantized(scheme, model=untied, backend="vllm", algo=algo, overrides={NAME: of_embedding})
    folder = open_folder(str(out), Session.alone())
    assert (folder.schemes[NAME].name, len(folder.schemes)) == (of_embedding, 29)
    assert qplug.verify(str(out)).ok
    told = folder.checkpoint.config["quantization_config"]
    config = QuantizationConfig.model_validate(told)
    group = next(g for g in config.config_groups.values() if "Embedding" in g.targets)
    assert group.weights.num_bits == int(of_embedding[1])

    # compressed-tensors reads the same values, and finds the module by the same targets.
    theirs = BaseCompressor.get_value_from_registry("pack-quantized").decompress(
        folder.packed(NAME), group
    )["weight"]
    ours = folder.parameter(f"{NAME}.weight").to(theirs.dtype)
    assert torch.equal(ours, theirs)
    source = load_file(Path(untied) / "model.safetensors")[f"{NAME}.weight"].float()
    error = (ours.float() - source).norm() / source.norm()
    assert 0 < error < (0.01 if of_embedding == "W8A16" else 0.15)
    floats = open_checkpoint(out, readers=Registry.installed().sources)
    assert torch.equal(floats.read(f"{NAME}.weight").float(), ours.bfloat16().float())
    assert NAME in matched(out, group.targets, config.ignore)


def matched(out: Path, targets: list[str], ignore: list[str]) -> set[str]:
    """The modules of the model of ``out`` that compressed-tensors matches."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(out))
    return {name for name, _ in match_named_modules(model, targets, ignore)}


def test_other_linears_do_not_change_with_it(quantized: Quantized, untied: str) -> None:
    """A pattern with wildcards does not name it, and no step but its own reads it."""
    with_it, without = (
        load_file(
            quantized("W8A16", model=untied, backend="vllm", overrides=how) / "model.safetensors"
        )
        for how in ({NAME: "W8A16"}, {"*_proj": "W8A16"})
    )
    assert f"{NAME}.weight" in without
    assert f"{NAME}.weight_packed" in with_it
    for name in without.keys() - {f"{NAME}.weight"}:
        assert torch.equal(with_it[name], without[name]), name


def test_a_tied_embedding_stays_float(tmp_path: Path) -> None:
    with pytest.raises(QplugError, match="the head is computed with the same tensor"):
        qplug.quantize("qplug:demo", tmp_path / "out", backend="vllm", overrides={NAME: "W8A16"})


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"backend": "sglang"}, "SGLang 0.5.23 serves no quantized embedding"),
        ({"backend": "vllm", "options": {"engine": "0.26"}}, "vLLM 0.26.0 serves no quantized"),
        ({"backend": "vllm", "options": {"gpu": "cpu"}}, "looks up codes on GPUs alone"),
        ({"backend": "vllm", "of": "W8A8"}, "its inputs are numbers of tokens"),
        ({"backend": "vllm", "of": "W8A16_ASYM"}, "in W2A16, W4A16 or W8A16, not W8A16_ASYM"),
        ({"backend": "vllm", "of": "W6A16"}, "in W2A16, W4A16 or W8A16, not W6A16"),
        ({"backend": "gptq"}, "the format keeps heads and routers float"),
    ],
)
def test_what_does_not_look_it_up_refuses(
    untied: str, tmp_path: Path, how: dict[str, Any], said: str
) -> None:
    with pytest.raises(QplugError, match=said):
        qplug.quantize(
            untied,
            tmp_path / "out",
            scheme="W4A16" if how["backend"] != "gptq" else "W8A16",
            backend=how["backend"],
            backend_options=how.get("options", {}),
            overrides={NAME: how.get("of", "W8A16")},
            dry_run=True,
        )


def test_models_that_vllm_builds_it_float_for(tmp_path: Path) -> None:
    out = edited(tmp_path / "helium", architectures=["HeliumForCausalLM"])
    with pytest.raises(QplugError, match="builds the embedding of HeliumForCausalLM float"):
        qplug.quantize(str(out), tmp_path / "out", backend="vllm", overrides={NAME: "W8A16"})


def test_a_llama_needs_the_class(quantized: Quantized, untied: str, tmp_path: Path) -> None:
    out = quantized("W4A16", model=untied, backend="vllm", overrides={NAME: "W8A16"})
    broken = forget_checksums(copytree(out, tmp_path / "broken"))
    config = json.loads((broken / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["targets"] = [each for each in group["targets"] if each != "Embedding"]
    (broken / "config.json").write_text(json.dumps(config))
    (problem,) = qplug.verify(str(broken), backend="vllm").problems
    assert str(problem) == (
        f"embedding: {NAME}: needs the target Embedding: vLLM 0.33.0 builds that of "
        "LlamaForCausalLM without a name"
    )
    assert qplug.verify(str(broken), backend="compressed-tensors").ok
    said = {str(each) for each in qplug.verify(str(broken), backend="sglang").problems}
    assert said == {f"embedding: {NAME}: SGLang 0.5.23 serves no quantized embedding"}


def test_the_class_alone_names_it(quantized: Quantized, untied: str, tmp_path: Path) -> None:
    """As other writers have it."""
    out = quantized("W4A16", model=untied, backend="vllm", overrides={NAME: "W8A16"})
    theirs = forget_checksums(copytree(out, tmp_path / "theirs"))
    config = json.loads((theirs / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["targets"] = [each for each in group["targets"] if each != NAME]
    (theirs / "config.json").write_text(json.dumps(config))
    assert qplug.verify(str(theirs), backend="vllm").ok
    assert open_folder(str(theirs), Session.alone()).schemes[NAME].name == "W8A16"


def test_it_can_be_measured_without_an_engine(quantized: Quantized, untied: str) -> None:
    how = {"model": untied, "overrides": {NAME: "W4A16"}}
    fake = quantized("W4A16", backend="fake", **how)
    packed = quantized("W4A16", backend="compressed-tensors", **how)
    name = f"{NAME}.weight"
    floats = load_file(fake / "model.safetensors")[name]
    exact = open_folder(str(packed), Session.alone()).parameter(name)
    assert torch.equal(floats, exact.to(floats.dtype))
    assert open_folder(str(fake), Session.alone()).schemes[NAME].name == "W4A16"
