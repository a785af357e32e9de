"""A run from a checkpoint to a folder: what is written, what is left alone, and who is blamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file

import qplug
from qplug.api.scheme import PRESETS
from qplug.checkpoint.open import INDEX, SINGLE
from qplug.errors import QplugError, StageError
from qplug.machine.session import Session
from qplug.numerics.rounding import round_to_nearest
from qplug.reading.folder import open_folder
from qplug.reading.verify import verify
from qplug.registry.registry import Registry
from qplug.run.quantize import quantize

if TYPE_CHECKING:
    Contents = Callable[[Path], dict[str, bytes | None]]

DEMO = Path(qplug.__file__).parent / "demo"
REFERENCE = Path(__file__).parents[3] / "shared" / "models" / "ref-19m"
BACKENDS = ("sglang", "vllm", "compressed-tensors", "fake")
#: Presets that engines have no kernel for; SGLang has no integers of other than 4 and 8 bits.
NOT_SERVED = [
    ("FP8A16_BLOCK", "vllm"),
    *(
        (scheme, "sglang")
        for scheme, preset in PRESETS.items()
        if scheme in ("W8A8_STATIC", "W4AFP8", "W4A8", "W8A16_ASYM", "MXFP8", "FP8A16_BLOCK")
        or scheme.startswith("MXFP4")
        or (preset.weights.dtype.startswith("int") and preset.weights.bits not in (4, 8))
    ),
]
#: The error of a weight of the demo model that is rounded to nearest, by dtype: halved by each bit.
LIMITS = {f"int{bits}": 0.6 * 2.0 ** (2 - bits) for bits in range(2, 8)}
LIMITS |= {"int8": 0.01, "e4m3": 0.03, "e2m1": 0.12}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


# --- what is written -----------------------------------------------------------------------------


def _pairs() -> Iterator[Any]:
    """Every scheme with every backend; by default each scheme with one backend, in turn."""
    chosen = {
        scheme: served[number % len(served)]
        for number, scheme in enumerate(PRESETS)
        if (served := [b for b in BACKENDS if (scheme, b) not in NOT_SERVED])
    }
    for scheme, backend in product(PRESETS, BACKENDS):
        if (scheme, backend) not in NOT_SERVED:
            marks = () if chosen[scheme] == backend else pytest.mark.slow
            yield pytest.param(scheme, backend, marks=marks)


@pytest.mark.parametrize(("scheme", "backend"), [*_pairs()])
def test_the_demo_model_for_every_backend(backend: str, scheme: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = quantize(
        "qplug:demo", out, scheme=scheme, backend=backend, samples=4, seq_len=64, device="cpu"
    )
    assert result.out == out
    assert (result.resumed, result.dry_run) == (0, False)
    assert len(result.errors) == 28
    limit = LIMITS[PRESETS[scheme].weights.dtype]
    assert all(0 < error < limit for error in result.errors.values())
    held = tensors_of(out)
    assert result.bytes == sum(tensor.nbytes for tensor in held.values())
    assert result.source_bytes == sum(tensor.nbytes for tensor in tensors_of(DEMO).values())
    found = verify(str(out))
    assert found.problems == ()
    assert (found.linears, found.backend, found.against) == (28, backend, "qplug:demo")
    for name, error in result.errors.items():
        # Four digits are told. The fake backend rounds what codes stand for to bfloat16.
        slack = 2.0**-8 if backend == "fake" else 5.01e-4 * error
        assert abs(found.errors[name] - error) <= slack


def test_what_lies_in_the_folder(tmp_path: Path) -> None:
    quantize("qplug:demo", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("qplug.json", "tokenizer.json", "tokenizer_config.json"),
    }
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (DEMO / name).read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert config == json.loads((DEMO / "config.json").read_text())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# `qplug:demo`, W4A16\n" in card
    assert "python -m sglang.launch_server --model-path ." in card


def test_codes_are_those_of_the_algorithm(llama: Path, tmp_path: Path) -> None:
    quantize(str(llama), tmp_path / "out", group_size=32)
    opened = open_folder(str(tmp_path / "out"), Session.alone())
    weights = tensors_of(llama)
    assert len(opened.schemes) == 14
    for name, scheme in opened.schemes.items():
        args = scheme.with_scale_dtype("bfloat16").weights
        wanted = round_to_nearest(weights[f"{name}.weight"], args)
        stored = {
            local: opened.checkpoint.read(f"{name}.{local}")
            for local in ("weight_packed", "weight_scale", "weight_shape")
        }
        assert opened.exporter is not None
        codes = opened.exporter.format.unpack(stored, scheme)
        assert torch.equal(codes.codes, wanted.codes)
        assert torch.equal(codes.scale, wanted.scale)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_quantized_stays_as_it_is(backend: str, llama: Path, tmp_path: Path) -> None:
    result = quantize(
        str(llama), tmp_path / "out", backend=backend, ignore=["*.0.mlp.*"], shard_bytes=50_000
    )
    assert not any(".0.mlp." in name for name in result.errors)
    before, after = tensors_of(llama), tensors_of(tmp_path / "out")
    untouched = [name for name in before if name.rpartition(".")[0] not in result.errors]
    assert len(untouched) == 9
    for name in untouched:
        assert torch.equal(before[name], after[name])
        assert before[name].dtype == after[name].dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_of_models(dtype: str, tmp_path: Path, write_llama: Callable[..., Path]) -> None:
    model = write_llama(tmp_path / "llama", dtype=dtype)
    quantize(str(model), tmp_path / "out")
    held = tensors_of(tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj"
    assert held[f"{name}.weight_scale"].dtype == getattr(torch, dtype)
    assert held["model.embed_tokens.weight"].dtype == getattr(torch, dtype)
    assert held[f"{name}.weight_packed"].dtype == torch.int32


def test_a_head_of_its_own_stays_float(tmp_path: Path, write_llama: Callable[..., Path]) -> None:
    model = write_llama(tmp_path / "llama", tie_word_embeddings=False)
    result = quantize(str(model), tmp_path / "out")
    assert "lm_head" not in result.errors
    assert torch.equal(
        tensors_of(tmp_path / "out")["lm_head.weight"], tensors_of(model)["lm_head.weight"]
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "lm_head" in config["quantization_config"]["ignore"]


def test_overrides_reach_the_files(llama: Path, tmp_path: Path) -> None:
    quantize(str(llama), tmp_path / "out", backend="vllm", overrides={"re:.*down_proj": "W8A16"})
    opened = open_folder(str(tmp_path / "out"), Session.alone())
    kinds = {name: scheme.name for name, scheme in opened.schemes.items()}
    assert kinds.pop("model.layers.0.mlp.down_proj") == "W8A16"
    assert kinds.pop("model.layers.1.mlp.down_proj") == "W8A16"
    assert set(kinds.values()) == {"W4A16"}
    assert verify(str(tmp_path / "out")).ok is False  # there is no tokenizer
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    assert verify(str(tmp_path / "out")).ok


def test_tensors_of_a_linear_are_found_without_a_look_at_all(tmp_path: Path) -> None:
    """A model may have a hundred thousand."""
    looks = 0

    class Counted(dict[str, Any]):
        def __iter__(self) -> Iterator[str]:
            nonlocal looks
            looks += 1
            return super().__iter__()

    out = tmp_path / "out"
    quantize("qplug:demo", out, scheme="FP8", backend="vllm", samples=2, seq_len=16)
    opened = open_folder(str(out), Session.alone())
    tensors = Counted(opened.checkpoint.tensors)
    opened = replace(opened, checkpoint=replace(opened.checkpoint, tensors=tensors))
    for name in opened.schemes:
        assert opened.packed(name).keys() == {"weight", "weight_scale", "input_scale"}
        assert opened.input_scale(name) is not None
    assert looks <= 1


def test_the_manifest(llama: Path, tmp_path: Path) -> None:
    result = quantize(str(llama), tmp_path / "out", group_size=64, seed=3)
    manifest = json.loads((tmp_path / "out" / "qplug.json").read_text())
    assert manifest["model"] == llama.name
    assert manifest["recipe"]["algorithms"] == ["rtn"]
    assert manifest["recipe"]["scheme"]["weights"]["group_size"] == 64
    assert manifest["recipe"]["seed"] == 3
    assert manifest["versions"]["qplug"] == qplug.__version__
    assert manifest["versions"]["torch"] == version("torch")
    assert {name: layer["error"] for name, layer in manifest["layers"].items()} == result.errors


# --- shards --------------------------------------------------------------------------------------


def test_shards(llama: Path, tmp_path: Path) -> None:
    quantize(str(llama), tmp_path / "one")
    result = quantize(str(llama), tmp_path / "many", shard_bytes=40_000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert [path.name for path in files] == [
        f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    ]
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    assert index["metadata"] == {"total_size": result.bytes}
    places = {}
    for path in files:
        with safetensors.safe_open(path, "pt") as file:
            places |= dict.fromkeys(file.keys(), path.name)
        assert sum(tensor.nbytes for tensor in load_file(path).values()) <= 40_000
    assert index["weight_map"] == places
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert not (tmp_path / "one" / INDEX).exists()
    assert (tmp_path / "one" / SINGLE).exists()
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_a_shard_smaller_than_a_tensor_holds_one_step(llama: Path, tmp_path: Path) -> None:
    quantize(str(llama), tmp_path / "out", shard_bytes=0)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 14 + 6
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    assert verify(str(tmp_path / "out")).ok


# --- the same bytes ------------------------------------------------------------------------------


def test_the_same_twice(llama: Path, tmp_path: Path, contents: Contents) -> None:
    for out in ("a", "b"):
        quantize(str(llama), tmp_path / out, shard_bytes=60_000)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_model_is_only_read(llama: Path, tmp_path: Path, contents: Contents) -> None:
    before = contents(llama)
    times = {path: path.stat().st_mtime_ns for path in llama.iterdir()}
    quantize(str(llama), tmp_path / "out")
    assert contents(llama) == before
    assert {path: path.stat().st_mtime_ns for path in llama.iterdir()} == times


def test_how_the_source_is_cut_does_not_matter(
    llama: Path, tmp_path: Path, write_llama: Callable[..., Path], contents: Contents
) -> None:
    single = write_llama(tmp_path / "single")
    quantize(str(llama), tmp_path / "a")
    quantize(str(single), tmp_path / "b")
    assert (tmp_path / "a" / SINGLE).read_bytes() == (tmp_path / "b" / SINGLE).read_bytes()


# --- files beside the weights --------------------------------------------------------------------


def test_a_source_that_says_nonsense_of_itself(llama: Path, tmp_path: Path) -> None:
    """What is rotated as a folder runs stands in its qplug.json: it cannot be passed over."""
    (llama / "qplug.json").write_text("the qplug.json of something else")
    with pytest.raises(QplugError, match=r"qplug\.json: cannot be read"):
        quantize(str(llama), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_companions(llama: Path, tmp_path: Path) -> None:
    kept = {
        *("tokenizer.json", "tokenizer.model", "vocab.txt", "merges.txt", "chat_template.jinja"),
        *("modeling_mine.py", "generation_config.json", "preprocessor_config.json", "LICENSE"),
    }
    left = {
        *("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors"),
        *("model.gguf", "tf_model.h5", "flax_model.msgpack", "model.onnx", "x.pt", "x.pth"),
        *(".gitattributes", "training.ckpt"),
    }
    for name in kept | left | {"README.md"}:
        (llama / name).write_text(f'{{"is": "the {name} of the source"}}')
    (llama / "additional_chat_templates").mkdir()
    (llama / "additional_chat_templates" / "tools.jinja").write_text("tools")
    (llama / "additional_chat_templates" / "notes.txt").write_text("notes")
    (llama / "original").mkdir()
    (llama / "original" / "params.json").write_text("{}")
    quantize(str(llama), tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")}
    assert found == kept | {
        *("README.md", "qplug.json", "config.json", SINGLE),
        *("additional_chat_templates", "additional_chat_templates/tools.jinja"),
    }
    for name in kept:
        assert (tmp_path / "out" / name).read_text() == f'{{"is": "the {name} of the source"}}'
    for name in ("README.md", "qplug.json"):
        assert "of the source" not in (tmp_path / "out" / name).read_text()


def test_links_of_the_hubs_cache_are_followed(llama: Path, tmp_path: Path) -> None:
    """A result made of links would break when the cache is cleared."""
    repository = tmp_path / "hub" / "models--tiny--llama"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "8f2a"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (llama / "tokenizer.json").write_text("{}")
    for number, path in enumerate(llama.iterdir()):
        path.rename(blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    quantize(str(snapshot), tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


# --- where to ------------------------------------------------------------------------------------


def test_overwrite_replaces_the_whole_folder(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(str(llama), out, shard_bytes=40_000)
    quantize(str(llama), out, scheme="W8A16", overwrite=True)
    assert {path.name for path in out.iterdir()} == {
        *("README.md", "config.json", "qplug.json", SINGLE)
    }
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "out"}


def test_overwrite_nothing_of_the_users(llama: Path, tmp_path: Path, contents: Contents) -> None:
    out = tmp_path / "out"
    quantize(str(llama), out)
    for name in ("notes.txt", "src/main.c", "additional_chat_templates"):
        extra = out / name
        extra.parent.mkdir(exist_ok=True)
        if extra.suffix:
            extra.write_text("years of work")
        else:
            extra.mkdir()
        before = contents(tmp_path)
        with pytest.raises(QplugError) as caught:
            quantize(str(llama), out, scheme="W8A16", overwrite=True)
        assert str(caught.value) == (
            f"{out}: holds {name.partition('/')[0]}, which qplug did not write, so it is not "
            "overwritten; choose another folder"
        )
        assert contents(tmp_path) == before
        shutil.rmtree(extra.parent if extra.parent != out else extra, ignore_errors=True)
        extra.unlink(missing_ok=True)
    quantize(str(llama), out, scheme="W8A16", overwrite=True)


def test_overwrite_what_an_earlier_version_wrote(llama: Path, tmp_path: Path) -> None:
    """Its qplug.json lists no files."""
    out = tmp_path / "out"
    quantize(str(llama), out)
    record = json.loads((out / "qplug.json").read_text())
    del record["checksums"], record["checksum"]
    (out / "qplug.json").write_text(json.dumps(record))
    assert quantize(str(llama), out, scheme="W8A16", overwrite=True).out == out
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "out"}


def test_overwrite_an_empty_folder(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    quantize(str(llama), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / SINGLE).exists()


def test_overwrite_where_there_is_nothing(llama: Path, tmp_path: Path) -> None:
    quantize(str(llama), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / SINGLE).exists()


@pytest.mark.parametrize("out", ["out", "./out", "../out", "down/../../out", "link/out"])
def test_relative_paths(
    out: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "down").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "here")
    wanted = Path(os.path.realpath(out))
    quantize("../llama", out)
    assert (wanted / SINGLE).exists()
    assert not list(tmp_path.rglob(".*"))


def test_inside_the_model(llama: Path, contents: Contents) -> None:
    before = contents(llama)
    quantize(str(llama), llama / "quantized")
    shutil.rmtree(llama / "quantized")
    assert contents(llama) == before


def test_dry_run(llama: Path, tmp_path: Path, contents: Contents) -> None:
    before = contents(tmp_path)
    told = quantize(str(llama), tmp_path / "out", dry_run=True)
    assert contents(tmp_path) == before
    assert told.dry_run
    result = quantize(str(llama), tmp_path / "out")
    assert (told.bytes, told.source_bytes) == (result.bytes, result.source_bytes)


# --- progress ------------------------------------------------------------------------------------


def test_every_step_is_told(llama: Path, tmp_path: Path) -> None:
    told: list[tuple[Any, ...]] = []
    result = quantize(str(llama), tmp_path / "out", watch=lambda *step: told.append(step[:3]))
    assert [step[0] for step in told] == list(range(1, 21))
    assert {step[1] for step in told} == {20}
    assert result.errors.keys() <= {step[2] for step in told}
    names = [step[2] for step in told]
    assert names.index("model.layers.0.mlp.down_proj") < names.index("model.layers.1.mlp.down_proj")


# --- plugins -------------------------------------------------------------------------------------

PLUGIN = '''
from qplug import Algorithm, Exporter, Format, NoParams, QuantizedWeight, TensorSpec, hookimpl
from qplug.numerics.rounding import round_to_nearest
import dataclasses, torch

class Halve(Algorithm[NoParams]):
    """Round half of what is there."""
    name = "halve"
    def quantize(self, block):
        return {each.name: round_to_nearest(each.weight / 2, each.args) for each in block.linears}

class Spoil(Algorithm[NoParams]):
    """Change what is not mine, and fail."""
    name = "spoil"
    def quantize(self, block):
        return {}

class Idle(Algorithm[NoParams]):
    """Do nothing yet."""
    name = "idle"

class Codes(Format):
    def layout(self, shape, scheme, dtype):
        scales = scheme.weights.scale_shape(shape)
        return {"codes": TensorSpec("int8", shape), "scale": TensorSpec("float32", scales)}
    def pack(self, weight, scheme, dtype):
        return {"codes": weight.codes, "scale": weight.scale}
    def unpack(self, tensors, scheme):
        return QuantizedWeight(tensors["codes"], tensors["scale"], None, scheme.weights)
    def config(self, model, schemes):
        return {"quant_method": "plain"}

class Plain(Exporter[NoParams]):
    """Codes as they are, or not."""
    name = "plain"
    format = Codes()

class Lies(Codes):
    def pack(self, weight, scheme, dtype):
        return {"codes": weight.codes.to(torch.int16), "scale": weight.scale}

class Liar(Exporter[NoParams]):
    """Packs what it did not announce."""
    name = "liar"
    format = Lies()

@hookimpl
def qplug_algorithms():
    return [Halve, Spoil, Idle]

@hookimpl
def qplug_exporters():
    return [Plain, Liar]
'''


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    (tmp_path / "mine.py").write_text(PLUGIN)
    return Registry.installed(files=[tmp_path / "mine.py"])


def test_an_exporter_in_a_file(llama: Path, tmp_path: Path, registry: Registry) -> None:
    result = quantize(str(llama), tmp_path / "out", backend="plain", registry=registry)
    held = tensors_of(tmp_path / "out")
    name = "model.layers.1.mlp.up_proj"
    # That of a scheme without activations: scales are in the model's dtype, kept as float32.
    codes, scale = held[f"{name}.codes"].float(), held[f"{name}.scale"]
    weight = tensors_of(llama)[f"{name}.weight"].float()
    restored = (codes.unflatten(1, (-1, 128)) * scale[..., None]).flatten(1)
    assert ((restored - weight).norm() / weight.norm()).item() == pytest.approx(
        result.errors[name], rel=1e-3
    )


def test_an_algorithm_in_a_file(llama: Path, tmp_path: Path, registry: Registry) -> None:
    result = quantize(str(llama), tmp_path / "out", algo="halve", registry=registry)
    assert all(error == pytest.approx(0.5, abs=0.05) for error in result.errors.values())


def test_rtn_quantizes_where_no_algorithm_does(
    llama: Path, tmp_path: Path, registry: Registry
) -> None:
    quantize(str(llama), tmp_path / "a", algo="idle", registry=registry)
    quantize(str(llama), tmp_path / "b")
    assert (tmp_path / "a" / SINGLE).read_bytes() == (tmp_path / "b" / SINGLE).read_bytes()


def test_two_that_quantize_are_refused(llama: Path, tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(QplugError, match="rtn and halve both choose codes"):
        quantize(str(llama), tmp_path / "out", algo="rtn+idle+halve", registry=registry)


@pytest.mark.parametrize(
    ("words", "who", "complaint"),
    [
        ({"backend": "liar"}, "liar", "pack gave"),
        ({"algo": "spoil"}, "spoil", "it gave codes for [], not ['model.layers.0."),
    ],
)
def test_a_plugin_that_breaks_its_promise(
    words: dict[str, str], who: str, complaint: str, llama: Path, tmp_path: Path, registry: Registry
) -> None:
    with pytest.raises(StageError) as caught:
        quantize(str(llama), tmp_path / "out", registry=registry, **words)
    assert str(caught.value).startswith(f"plugin {who} (")
    assert "model.layers.0." in str(caught.value)
    assert complaint in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_plugin_in_a_file_is_told_apart_by_what_it_says(
    llama: Path, tmp_path: Path, registry: Registry
) -> None:
    """No path of this machine is published, and a changed file does not go on with a run."""
    quantize(str(llama), tmp_path / "a", algo="halve", registry=registry)
    (tmp_path / "mine.py").write_text(PLUGIN + "# changed\n")
    again = Registry.installed(files=[tmp_path / "mine.py"])
    quantize(str(llama), tmp_path / "b", algo="halve", registry=again)
    first, second = (
        json.loads((tmp_path / out / "qplug.json").read_text())["versions"] for out in "ab"
    )
    libraries = {"numpy", "safetensors", "torch", "transformers"}
    assert first.keys() == second.keys() == {"mine", "qplug", *libraries}
    assert first["mine"] != second["mine"]
    assert str(tmp_path) not in json.dumps(first)


# --- a larger model ------------------------------------------------------------------------------


@pytest.mark.skipif(not REFERENCE.exists(), reason="the reference model is not here")
def test_the_reference_model(tmp_path: Path) -> None:
    result = quantize(str(REFERENCE), tmp_path / "out", shard_bytes=5_000_000)
    found = verify(str(tmp_path / "out"), against=str(REFERENCE))
    assert found.ok
    assert found.linears == len(result.errors) > 28
