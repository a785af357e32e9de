"""A plugin names the towers of a model that comes with its own code, and it is rotated then."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import qplug
from qplug import BuiltFloat, ModelView, QplugError, Towers, hookimpl
from qplug.checkpoint.locate import DEMO, find_model
from qplug.checkpoint.open import open_checkpoint
from qplug.model.architectures import find_view
from qplug.model.hollow import build, load_config
from qplug.model.known_towers import known_towers, with_known
from qplug.model.skeleton import Skeleton
from qplug.reading.load import load
from qplug.registry.registry import Registry

if TYPE_CHECKING:
    from click.testing import Result

    Cli = Callable[..., Result]

#: What float32 may lose, relative to the logits.
RTOL = 1e-5

CONFIGURATION = """
from transformers import PreTrainedConfig


class GlanceConfig(PreTrainedConfig):
    model_type = "glance"

    def __init__(self, vocab_size=4096, hidden_size=64, depth=2, wide=128, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.wide = depth, wide
        super().__init__(**kwargs)
"""
#: Patches of a picture, and a vector behind each row of two, take the place of tokens of number 7.
MODEL = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_glance import GlanceConfig


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.mix = nn.Linear(config.hidden_size, config.hidden_size)
        self.up = nn.Linear(config.hidden_size, config.wide, bias=False)
        self.down = nn.Linear(config.wide, config.hidden_size, bias=False)

    def forward(self, states, counts):
        read = self.norm(states)
        mixed = torch.tanh(self.mix(read)).cumsum(1) / counts
        return states + self.down(torch.relu(self.up(read)) + mixed.repeat(1, 1, 2))


class Bridge(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.steps = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, config.hidden_size)])
        self.at = nn.Embedding(4, config.hidden_size)

    def forward(self, seen):
        first, last = self.steps
        return last(torch.relu(first(seen))) + self.at.weight


class GlanceForConditionalGeneration(PreTrainedModel):
    config_class = GlanceConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.eye = nn.Linear(48, 32)
        self.bridge = Bridge(config)
        self.row_end = nn.Parameter(torch.zeros(config.hidden_size))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.last_norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def get_output_embeddings(self):
        return self.out

    def forward(self, input_ids, pixel_values=None, use_cache=None, **_):
        states = self.words(input_ids)
        if pixel_values is not None:
            rows = self.bridge(torch.relu(self.eye(pixel_values))).view(2, 2, -1)
            seen = torch.cat([rows, self.row_end.expand(2, 1, -1)], 1).flatten(0, 1)
            states = states.masked_scatter((input_ids == 7)[..., None], seen)
        counts = torch.arange(1, input_ids.shape[1] + 1)[:, None]
        for block in self.blocks:
            states = block(states, counts)
        return CausalLMOutput(logits=self.out(self.last_norm(states)))
"""
CONFIG: dict[str, Any] = {
    "architectures": ["GlanceForConditionalGeneration"],
    "auto_map": {
        "AutoConfig": "configuration_glance.GlanceConfig",
        "AutoModelForCausalLM": "modeling_glance.GlanceForConditionalGeneration",
    },
    "model_type": "glance",
    "dtype": "float32",
    "vocab_size": 4096,
    "hidden_size": 64,
    "depth": 2,
    "wide": 128,
}
RIGHT = (
    Towers(("eye", "bridge"), ("bridge.steps.#.*",)),
    Towers(("bridge",), ("bridge.at.*",), axis=1),
    Towers(("row_end",), ("row_end",)),
)
PLUGIN = """
from qplug import ModelView, Towers, hookimpl


@hookimpl
def qplug_model_view(config):
    if config.get("model_type") != "glance":
        return None
    return ModelView(
        config={},
        dtype="float32",
        linears={},
        quantizable=frozenset(),
        blocks=(),
        head=None,
        towers=(
            Towers(("eye", "bridge"), ("bridge.steps.#.*",)),
            Towers(("bridge",), ("bridge.at.*",), axis=1),
            Towers(("row_end",), ("row_end",)),
        ),
    )
"""


@pytest.fixture
def glance(tmp_path: Path) -> Path:
    """A random model that sees, of a class that transformers does not have, in float32."""
    folder = tmp_path / "glance"
    folder.mkdir()
    (folder / "configuration_glance.py").write_text(CONFIGURATION)
    (folder / "modeling_glance.py").write_text(MODEL)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(find_model(DEMO) / file, folder)
    config = load_config(folder, trust_remote_code=True)
    hollow = build(config, folder, trust_remote_code=True).state_dict()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(value.shape, generator=generator) * value.shape[-1] ** -0.5
        if value.ndim > 1
        else torch.rand(value.shape, generator=generator) + 0.5
        for name, value in hollow.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


NOTHING = ModelView({}, "float32", {}, frozenset(), (), None)


class Seer:
    """Says ``view`` of a glance."""

    def __init__(self, view: ModelView) -> None:
        self.view = view

    @hookimpl
    def qplug_model_view(self, config: Mapping[str, Any]) -> ModelView | None:
        return self.view if config.get("model_type") == "glance" else None


def seen(model: Path, view: ModelView | None = None) -> ModelView:
    """The view of ``model`` if a plugin says ``view`` of it."""
    registry = Registry.installed()
    if view is not None:
        registry = registry.with_(Seer(view), "seer")
    return find_view(open_checkpoint(model), registry, Skeleton(model, trust_remote_code=True))


def quarot(model: Path, *towers: Towers) -> Path:
    registry = Registry.installed().with_(Seer(replace(NOTHING, towers=towers)), "seer")
    out = model.with_name("out")
    qplug.quantize(
        str(model), out, algo="quarot", backend="hf", trust_remote_code=True, registry=registry
    )
    return out


def answers(folder: Path, seed: int | None) -> Tensor:
    """The logits of a text, with the picture of ``seed`` in it if there is one."""
    tokens = torch.tensor([[5, 6, *([7] * 6 if seed is not None else []), 8, 9, 10]])
    inputs = {}
    if seed is not None:
        inputs["pixel_values"] = torch.randn(4, 48, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        logits: Tensor = load(str(folder), trust_remote_code=True)(tokens, **inputs).logits
    return logits


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def test_a_model_that_a_plugin_knows_is_rotated(glance: Path, tmp_path: Path, cli: Cli) -> None:
    plugin, out = tmp_path / "seer.py", tmp_path / "out"
    plugin.write_text(PLUGIN)
    algorithm = ("--algo", "quarot", "--backend", "hf", "--group-size", 32)
    words = ("quantize", glance, *algorithm, "--trust-remote-code", "--out", out)
    refused = cli(*words)
    assert refused.exit_code == 1
    assert "quarot: row_end and eye and bridge write what the decoder reads, too" in refused.output
    done = cli("--plugin", plugin, *words)
    assert done.exit_code == 0, done.output
    before, after = (open_checkpoint(folder).tensors for folder in (glance, out))
    turned = {n for n, tensor in before.items() if not torch.equal(tensor.read(), after[n].read())}
    beside = {"bridge.steps.1.weight", "bridge.steps.1.bias", "bridge.at.weight", "row_end"}
    assert {name for name in turned if name.startswith(("eye", "bridge", "row_end"))} == beside
    for seed in (None, 1):
        assert distance(answers(out, seed), answers(glance, seed)) <= RTOL
    assert distance(answers(glance, 2), answers(glance, 1)) > 100 * RTOL


@pytest.mark.parametrize("of", ["a view that adds", "a view of all"])
def test_a_rotated_model_is_quantized(glance: Path, tmp_path: Path, of: str) -> None:
    view = replace(NOTHING if of == "a view that adds" else seen(glance), towers=RIGHT)
    assert seen(glance, view).towers == RIGHT
    result = qplug.quantize(
        str(glance),
        tmp_path / "out",
        algo="quarot+rtn",
        scheme="W8A8",
        backend="compressed-tensors",
        trust_remote_code=True,
        registry=Registry.installed().with_(Seer(view), "seer"),
    )
    assert len(result.errors) == 6
    quantized = answers(tmp_path / "out", 1)
    assert 0 < distance(quantized, answers(glance, 1)) < 0.05


@pytest.mark.parametrize(
    ("towers", "sentence"),
    [
        (
            Towers(("eyes",), ()),
            "eyes is no part that text passes by; such parts are: row_end, eye, bridge",
        ),
        (Towers(("bridge",), ("bridge.stairs.*",)), "no parameter matches bridge.stairs.*"),
        (
            Towers(("bridge",), ("*.weight",), axis=1),
            "*.weight matches words.weight, which is in none of bridge",
        ),
        (
            Towers(("bridge",), ("bridge.steps.#.*",), axis=1),
            "bridge.steps.1.weight writes along axis 0, not 1, in Linear",
        ),
        (
            Towers(("bridge",), ("bridge.at.*",)),
            "bridge.at.weight writes along axis 1, not 0, in Embedding",
        ),
        (
            Towers(("bridge",), ("bridge.at.*",), axis=2),
            "bridge.at.weight is [4, 64] in a small copy, and has no axis 2",
        ),
        (
            Towers(("bridge",), ("bridge.steps.#.weight",)),
            "bridge.steps.1.bias is added to what bridge.steps.1.weight writes, so it must be a "
            "writer, too",
        ),
        (
            Towers(("bridge",), ("bridge.steps.#.#.*",)),
            "bridge.steps.#.#.* has more than one #",
        ),
    ],
)
def test_what_does_not_hold_is_told_with_the_plugin(
    glance: Path, towers: Towers, sentence: str
) -> None:
    pattern = f"^plugin seer .*: qplug_model_view: towers: {re.escape(sentence)}$"
    with pytest.raises(QplugError, match=pattern):
        quarot(glance, towers)


def test_a_writer_of_another_width_is_refused(glance: Path) -> None:
    with pytest.raises(
        QplugError, match=r"^bridge\.steps\.0\.bias: is \[32\]; .* axis 0 should be 64$"
    ):
        quarot(glance, Towers(("bridge",), ("bridge.steps.*",)))


def test_what_is_no_row_is_told(glance: Path) -> None:
    with pytest.raises(QplugError, match=r"qplug_model_view: towers has 'eye', not Towers"):
        quarot(glance, "eye")  # type: ignore[arg-type]


def test_parts_that_no_row_names_are_still_refused(glance: Path) -> None:
    with pytest.raises(QplugError, match="row_end writes what the decoder reads, too"):
        quarot(glance, *RIGHT[:2])


def test_what_a_plugin_adds_besides(glance: Path) -> None:
    """Weights that stay float, in a model whose linears qplug finds itself."""
    why = BuiltFloat("it is narrow")
    view = seen(glance, replace(NOTHING, built_float={"blocks.1.mix": why}))
    plain = seen(glance)
    assert plain.quantizable - view.quantizable == {"blocks.1.mix"}
    assert view.linears == plain.linears
    assert view.built_float["blocks.1.mix"] is why
    with pytest.raises(QplugError, match=r"blocks\.9\.mix is in built_float, but the model has no"):
        seen(glance, replace(NOTHING, built_float={"blocks.9.mix": why}))


def test_rows_of_a_plugin_and_of_the_table() -> None:
    llava = {"model_type": "llava"}
    (known,) = known_towers(llava)
    assert known.parts == ("vision_tower", "multi_modal_projector")
    ear, eye = Towers(("audio_tower",), ("*ear.*",)), Towers(("vision_tower",), ("*eye.*",))
    assert with_known((ear,), llava) == (ear, known)
    assert with_known((eye,), llava) == (eye,)
    assert with_known((ear,), {"model_type": "glance"}) == (ear,)
