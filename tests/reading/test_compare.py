"""A folder is run beside its float model: what is wrong in what it computes is seen, and where."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from spoilt import forget_checksums

import qplug
from qplug.machine.session import Session
from qplug.reading.compare import Comparison, compare
from qplug.reading.folder import open_folder
from qplug.reading.load import load_folder
from qplug.reading.streamed import stream_folder

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    Cli = Callable[..., Result]

#: One window of 48 tokens of a text of our own: enough to see a fault, and soon read.
TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps under the old tree. " * 40
DOWN = "model.layers.2.mlp.down_proj"
FEW = {"samples": 4, "seq_len": 64}


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return {"dataset": "text", "dataset_options": {"path": str(path)}}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, text: dict[str, Any]) -> Callable[..., Path]:
    """The demo model quantized, once for each choice of options."""
    made: dict[str, Path] = {}

    def quantize(**options: Any) -> Path:
        key = str(sorted(options.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("compared") / "out"
            made[key] = qplug.quantize("qplug:demo", out, **{**text, **FEW, **options}).out
        return made[key]

    return quantize


@pytest.fixture
def run(text: dict[str, Any]) -> Callable[[Path], Comparison]:
    return lambda path: compare(str(path), "qplug:demo", windows=1, seq_len=48, **text)


def spoil(sound: Path, copy: Path) -> Path:
    """``sound`` with the rows of one layer in another order: no rule of a loader sees it."""
    shutil.copytree(sound, copy)
    tensors = load_file(sound / "model.safetensors")
    for part in ("weight_packed", "weight_scale"):
        tensors[f"{DOWN}.{part}"] = tensors[f"{DOWN}.{part}"].roll(1, 0)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return forget_checksums(copy)


@pytest.mark.parametrize(
    ("options", "kl"),
    [
        ({"scheme": "W4A16", "group_size": 32}, 0.2),
        ({"scheme": "W8A8"}, 0.02),
        ({"scheme": "W8A8", "algo": "smoothquant"}, 0.02),
        ({"scheme": "W8A8", "kv_cache": "fp8", "backend": "vllm"}, 0.04),
    ],
    ids=["W4A16", "W8A8", "smoothed", "cache"],
)
def test_a_sound_folder_computes_alike(
    folder: Callable[..., Path], run: Any, options: dict[str, Any], kl: float
) -> None:
    found = run(folder(**options))
    assert found.ok
    assert 0 < found.kl < kl
    assert 0.7 < found.top1 <= 1
    assert (found.tokens, found.note) == (48, None)
    assert list(found.blocks) == [f"model.layers.{number}" for number in range(4)]
    for block in found.blocks.values():
        assert 0 < block.alone < 0.3
        assert 0 < block.total < 0.3


def test_rotated_blocks_are_compared_after_the_rotation(
    folder: Callable[..., Path], run: Any
) -> None:
    found = run(folder(scheme="W8A8", algo="quarot"))
    assert found.ok
    assert found.note.startswith("blocks are compared after the rotation")
    assert len(found.blocks) == 4
    assert all(0 < block.alone < 0.1 for block in found.blocks.values())


@pytest.mark.parametrize("algo", ["awq", "quarot"])
def test_a_fault_in_rewritten_weights_is_seen_and_its_block_named(
    folder: Callable[..., Path], run: Any, tmp_path: Path, algo: str
) -> None:
    """The weights themselves cannot be compared there: ``verify`` alone finds nothing."""
    options = {"algorithm_options": {"awq": {"ratios": 4, "clip": False}}} if algo == "awq" else {}
    broken = spoil(folder(scheme="W4A16", algo=algo, **options), tmp_path / "broken")
    assert qplug.verify(str(broken)).ok
    found = run(broken)
    assert not found.ok
    assert found.worst(1) == ["model.layers.2"]
    others = [found.blocks[name].alone for name in found.blocks if name != "model.layers.2"]
    assert found.blocks["model.layers.2"].alone > 2 * max(others)


def test_another_embedding_leaves_the_predictions(
    folder: Callable[..., Path], run: Any, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folder(scheme="W8A8"), tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    found = run(copy)
    assert (found.ok, found.blocks) == (False, {})
    assert found.note == "blocks are not compared: the embeddings differ by more than a rotation"


def test_another_model_is_refused(folder: Callable[..., Path], llama: Path) -> None:
    with pytest.raises(qplug.QplugError, match=r"has other blocks than .*; it is a different"):
        compare(str(folder(scheme="W8A8")), str(llama))


# --- one block in memory --------------------------------------------------------------------------


@pytest.mark.parametrize("kv_cache", [None, "fp8"])
@torch.inference_mode()
def test_a_streamed_model_computes_what_a_loaded_one_does(
    folder: Callable[..., Path], kv_cache: str | None
) -> None:
    path = folder(scheme="W8A8", backend="vllm", kv_cache=kv_cache)
    opened = open_folder(str(path), Session.alone())
    model = stream_folder(opened, torch.device("cpu"))
    held = [
        {name for name, value in block.named_parameters() if not value.is_meta}
        for block in model.model.layers
    ]
    seen: list[int] = []
    for block in model.model.layers:
        block.mlp.register_forward_pre_hook(
            lambda *_: seen.append(sum(not p.is_meta for p in model.model.layers.parameters()))
        )
    tokens = torch.arange(4, 36)[None]
    streamed = model(tokens, use_cache=False).logits
    assert held == [set()] * 4
    assert seen == [9] * 4  # seven linears and two norms: never two blocks
    assert torch.equal(streamed, load_folder(opened)(tokens, use_cache=False).logits)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def words(text: dict[str, Any]) -> Callable[[Path], list[object]]:
    data = ["--dataset", "text", "--dataset-opt", f"path={text['dataset_options']['path']}"]
    few = ["--windows", 1, "--seq-len", 48]
    return lambda path: ["verify", path, "--against", "qplug:demo", *few, *data]


def test_verify_against(cli: Cli, folder: Callable[..., Path], words: Any) -> None:
    path = folder(scheme="W8A8")
    result = cli(*words(path))
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "sound: 28 quantized layers, as sglang loads them"
    assert lines[3].startswith("computes alike: on 48 tokens, KL divergence 0.0")
    assert [line.split(":")[0].split(".")[:2] for line in lines[4:]] == [["  model", "layers"]] * 3


def test_verify_against_ends_with_1_past_a_threshold(
    cli: Cli, folder: Callable[..., Path], words: Any
) -> None:
    path = folder(scheme="W8A8")
    result = cli(*words(path), "--max-kl", "0")
    assert result.exit_code == 1
    assert "does not compute alike: on 48 tokens, KL divergence" in result.stdout
    told = json.loads(cli(*words(path), "--min-top1", "1.1", "--json").stdout)
    assert (told["ok"], told["problems"]) == (False, [])
    assert told["comparison"]["min_top1"] == 1.1
