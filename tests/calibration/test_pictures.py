"""Statistics of a vision-language model see the tokens of pictures as the model itself does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from chats import WriteChats, shown, turns, write_picture, write_small_llava
from click.testing import Result
from torch import Tensor, nn

import qplug
from qplug.calibration.samples import Samples
from qplug.calibration.walk import Walk
from qplug.checkpoint.open import open_checkpoint
from qplug.machine.session import Session
from qplug.model.processor import load_processor
from qplug.model.tokenizer import load_tokenizer
from qplug.model.view import model_view
from qplug.registry.registry import Registry
from qplug.text.conversations import Renderer


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_llava(tmp_path_factory.mktemp("llava") / "model")


def test_a_walk_sees_pictures(tmp_path: Path, llava: Path, passes_in_float32: None) -> None:
    from transformers import LlavaForConditionalGeneration

    render = Renderer(load_tokenizer(str(llava)), False, lambda: load_processor(str(llava)))
    drawn = []
    for number, messages in enumerate([shown("0.png", "What?", "A cat."), turns("Hi", "Ho")]):
        write_picture(tmp_path / f"{number}.png", (90 * number, 20, 60))
        drawn.append(render(qplug.Conversation(messages, pictures=tmp_path)))
    source = open_checkpoint(llava)
    view = model_view(source)
    schemes = dict.fromkeys(view.quantizable, qplug.preset("W8A8"))
    samples = Samples.of(drawn)
    walk = Walk(source, view, schemes, samples, Session(Registry([])), propagate="float")

    model = LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32)
    rows: list[Tensor] = []
    block = model.model.language_model.layers[0]
    see = block.self_attn.q_proj.register_forward_pre_hook(lambda _, x: rows.append(x[0][0]))
    with torch.no_grad():
        for sample in drawn:
            model(input_ids=sample.tokens[None], **sample.extra)
    see.remove()
    assert isinstance(block, nn.Module)
    (group, *_) = walk.gather(view.blocks[0]).groups
    wanted = torch.cat(rows)
    assert group.tokens == len(wanted) == sum(len(sample.tokens) for sample in drawn)
    torch.testing.assert_close(group.gram, wanted.T @ wanted, rtol=1e-4, atol=1e-4)
    walk.close()


def test_a_run_on_conversations_with_pictures(
    tmp_path: Path, llava: Path, write_chats: WriteChats, cli: Callable[..., Result]
) -> None:
    write_picture(tmp_path / "pictures/cat.png")
    chats = write_chats(shown("cat.png", "What is it?", "A cat."), shown("cat.png", "So?", "Yes."))
    words = (
        *("quantize", llava, "--algo", "gptq", "--group-size", 32, "--backend", "vllm"),
        *("--dataset", "text", "--dataset-opt", f"path={chats}", "--samples", 2),
        *("--seq-len", 64, "--mask", "prompts"),
    )
    refused = cli(*words, "--out", tmp_path / "refused")
    assert refused.exit_code == 1
    assert f"{chats}:" in refused.output
    assert "no such picture" in refused.output
    result = cli(
        *words, "--dataset-opt", f"pictures={tmp_path / 'pictures'}", "--out", tmp_path / "q"
    )
    assert result.exit_code == 0, result.output
    layers = json.loads((tmp_path / "q/qplug.json").read_text())["layers"]
    assert len(layers) == 14
    assert all("language_model" in name for name in layers)
