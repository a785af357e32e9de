"""A walk through float blocks has the hidden states of the model's own forward, whatever a block.

Blocks get arguments by position, arguments of their own, tuples; they share keys and values, and
choices of tokens; the streams between them have four axes; something is added between two of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from zoo.make import make

from qplug import QuantArgs, Scheme
from qplug.api import ModelView
from qplug.calibration import batches
from qplug.calibration.samples import Samples
from qplug.calibration.walk import Walk
from qplug.checkpoint.open import open_checkpoint
from qplug.machine.session import Session
from qplug.model.architectures import by_linear
from qplug.model.block_call import hidden_states
from qplug.model.block_list import decoder_blocks
from qplug.model.view import model_view
from qplug.registry.registry import Registry

WalkOf = Callable[[Path, Samples], tuple[Walk, ModelView]]
INT4 = Scheme("int4", QuantArgs("int4", "group", 16))

#: What is odd about a model's blocks.
ODD = {
    "gptj": "a tuple with one part",
    "bamba": "a tuple with two parts, blocks of two kinds",
    "glm_moe_dsa": "choices of tokens go from block to block",
    "gemma4_text": "arguments by position, an argument of each block, shared keys and values",
    "zamba2": "the embeddings are an argument by position",
    "deepseek_v4": "several streams, names of other depths, a table of experts by token",
    "bloom": "alibi",
    "ernie4_5_moe": "a parameter that lies in another module on disk",
    "granitemoe": "a router that lies one level deeper on disk",
    "olmo_hybrid": "a convolution that is stored in three tensors",
    "llama4_text": "a model whose base model is itself",
    "nemotron_h": "blocks of one mixer each",
    "qwen3_next": "gated delta nets",
    "doge": "a parameter of the block itself",
    "axk2": "parts of norms that are linears",
    "mllama": "pictures, which no sample has",
    "qwen3_vl": "a decoder inside of a model of pictures",
    "minimax_m3_vl": "a linear whose rows are two linears on disk",
}
QUICK = ("gptj", "bamba", "gemma4_text", "ernie4_5_moe", "granitemoe")
#: Models with a table of positions that the reference has in another dtype.
TABLES = {"gptj"}


@pytest.fixture
def walk_of(monkeypatch: pytest.MonkeyPatch) -> WalkOf:
    """A walk through the float blocks of a folder, in float32, two samples at a time."""
    monkeypatch.setattr(batches, "_multiplies_bfloat16", lambda: False)

    def start(folder: Path, samples: Samples) -> tuple[Walk, ModelView]:
        registry = Registry([])
        source = by_linear(open_checkpoint(folder), registry)
        view = model_view(source)
        schemes = {name: INT4 for name in view.linears if name in view.quantizable}
        walk = Walk(
            source,
            view,
            schemes,
            samples,
            Session(registry),
            propagate="float",
            batch_size=2,
            with_targets=True,
        )
        return walk, view

    return start


@torch.no_grad()
def own_forward(folder: Path, view: ModelView, samples: Samples) -> dict[str, list[Tensor]]:
    """What leaves each block in transformers' own forward of each batch, by name on disk."""
    (architecture,) = view.config["architectures"]
    model = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32).eval()
    seen: dict[str, list[Tensor]] = {name: [] for name in view.blocks}

    def keep(name: str) -> Callable[[nn.Module, object, object], None]:
        return lambda module, inputs, output: seen[name].append(hidden_states(output))

    for path, name in zip(decoder_blocks(model, folder), view.blocks, strict=True):
        model.get_submodule(path).register_forward_hook(keep(name))
    for batch in samples.batches(2):
        model(**batch.inputs(torch.float32), use_cache=False)
    return seen


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in sorted(ODD)],
)
def test_a_walk_is_the_forward_of_the_model(name: str, tmp_path: Path, walk_of: WalkOf) -> None:
    folder = make(name, tmp_path / name)
    tokens = torch.randint(3, 4000, (3, 24), generator=torch.Generator().manual_seed(0))
    tokens[1, 20:] = -1
    samples = Samples(tokens)
    walk, view = walk_of(folder, samples)
    seen = own_forward(folder, view, samples)
    for block_name in view.blocks:
        block = walk.gather(block_name)
        assert block.reconstruction is not None
        outputs = [batch.target for batch in block.reconstruction.batches()]
        for output, expected in zip(outputs, seen[block_name], strict=True):
            error = (output - expected).norm() / expected.norm()
            assert error <= (1e-3 if name in TABLES else 1e-5)
        for group in block.groups:
            assert torch.isfinite(group.gram).all()
        walk.advance(block_name, {})
    walk.close()
