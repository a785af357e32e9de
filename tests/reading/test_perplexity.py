"""Perplexity against a direct computation of it, of float models and of quantized ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import qplug
from qplug import PRESETS, QplugError
from qplug.machine.session import Session
from qplug.numerics.activations import fake_quantize_activations
from qplug.reading import perplexity as evaluation
from qplug.reading.folder import open_folder
from qplug.reading.load import load
from qplug.reading.perplexity import Evaluation, evaluate, mean_loss
from qplug.registry.registry import Registry
from qplug.run.quantize import quantize

if TYPE_CHECKING:
    from click.testing import Result
    from conftest import Starter
    from transformers import PreTrainedModel

DEMO = Path(qplug.__file__).parent / "demo"
LENGTH = 48


def evaluated(model: object, **options: Any) -> Evaluation:
    return evaluate(str(model), **{"seq_len": LENGTH, "windows": 5, **options})


def text_tokens(count: int, length: int = LENGTH) -> Tensor:
    """The first tokens of the demo dataset's evaluation text, cut into windows."""
    from transformers import AutoTokenizer

    dataset = Registry.installed().datasets["demo"]
    text = "\n\n".join(dataset(dataset.Params()).documents("evaluation"))
    tokenizer = AutoTokenizer.from_pretrained(DEMO, model_max_length=10**9)
    ids = tokenizer.encode(text[: 20 * count * length], add_special_tokens=False)
    return torch.tensor(ids[: count * length]).view(count, length)


def textbook_perplexity(model: PreTrainedModel, tokens: Tensor) -> float:
    """One window at a time; probabilities in double precision."""
    losses = []
    with torch.no_grad():
        for window in tokens:
            logits = model(window[None]).logits[0].double()
            chances = logits.softmax(-1)[:-1].gather(1, window[1:, None])
            losses += chances.log().neg().flatten().tolist()
    return math.exp(sum(losses) / len(losses))


def demo_model() -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)


class Rounded(nn.Module):
    """A linear whose input is rounded before."""

    def __init__(
        self, linear: nn.Linear, scheme: qplug.Scheme, scale: Tensor | None = None
    ) -> None:
        super().__init__()
        assert scheme.activations is not None
        self.linear, self.args, self.scale = linear, scheme.activations, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(fake_quantize_activations(x, self.args, self.scale))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The demo model quantized by a scheme, for a backend; each is made once."""
    made: dict[tuple[str, str], Path] = {}

    def folder(scheme: str, backend: str = "compressed-tensors") -> Path:
        if (scheme, backend) not in made:
            out = tmp_path_factory.mktemp("quantized") / "out"
            quantize("qplug:demo", out, scheme=scheme, backend=backend, samples=4, seq_len=64)
            made[scheme, backend] = out
        return made[scheme, backend]

    return folder


# --- perplexity ----------------------------------------------------------------------------------


def test_a_float_model() -> None:
    found = evaluated("qplug:demo")
    wanted = textbook_perplexity(demo_model(), text_tokens(5))
    assert found.perplexity == pytest.approx(wanted, rel=1e-6)
    assert 5 < wanted < 100  # the demo model has learned something
    assert found == Evaluation("qplug:demo", found.perplexity, "demo", 5, LENGTH)


def test_the_second_token_is_predicted_from_the_first() -> None:
    found = evaluated("qplug:demo", seq_len=2, windows=7)
    wanted = textbook_perplexity(demo_model(), text_tokens(7, 2))
    assert found.perplexity == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("scheme", "backend"),
    [
        *((scheme, "compressed-tensors") for scheme in ("W4A16_ASYM", "W8A8", "FP8", "NVFP4")),
        *(
            pytest.param(scheme, "compressed-tensors", marks=pytest.mark.slow)
            for scheme in PRESETS
            if scheme not in ("W8A16", "W4A16_ASYM", "W8A8", "FP8", "NVFP4")
        ),
        ("W8A8", "fake"),
        ("W8A8_STATIC", "fake"),
        ("FP8", "fake"),
    ],
)
def test_a_quantized_model(
    scheme: str,
    backend: str,
    folders: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A window at a time, as the textbook has it: by another order of sums, inputs at the edge
    # between two codes would be rounded the other way.
    monkeypatch.setattr(evaluation, "_TOKENS", LENGTH)
    folder = folders(scheme, backend)
    opened = open_folder(str(folder), Session.alone())
    model = demo_model()
    assert len(opened.schemes) == 28
    for name, found in opened.schemes.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        before = linear.weight.detach().clone()
        linear.weight = nn.Parameter(opened.dequantized(name))
        assert not torch.equal(linear.weight, before)
        if found.activations is not None:
            scale = None
            if found.static_inputs:
                scale = opened.input_scale(name)
            model.set_submodule(name, Rounded(linear, found, scale))
    wanted = textbook_perplexity(model, text_tokens(5))
    assert evaluated(folder).perplexity == pytest.approx(wanted, rel=1e-6)
    assert wanted != pytest.approx(evaluated("qplug:demo").perplexity, rel=1e-5)


def test_activations_matter(folders: Callable[..., Path]) -> None:
    """W8A8 with its inputs left as they are is another model."""
    tokens = text_tokens(5)
    rounded = textbook_perplexity(load(str(folders("W8A8"))), tokens)
    left = textbook_perplexity(load(str(folders("W8A8")), quantize_activations=False), tokens)
    assert rounded == pytest.approx(evaluated(folders("W8A8")).perplexity, rel=1e-6)
    assert rounded != pytest.approx(left, rel=1e-5)


@pytest.mark.parametrize(
    ("scheme", "most"),
    [("W8A8", 1.02), ("W4A16", 1.25)],
)
def test_what_quantization_costs(scheme: str, most: float, folders: Callable[..., Path]) -> None:
    options = {"seq_len": 128, "windows": 16}
    before = evaluated("qplug:demo", **options).perplexity
    assert evaluated(folders(scheme), **options).perplexity < most * before


def test_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = demo_model(), text_tokens(7)
    losses, told = [], []
    for at_a_time in (1, LENGTH * 3, LENGTH * 100):
        monkeypatch.setattr(evaluation, "_TOKENS", at_a_time)
        losses.append(mean_loss(model, tokens, lambda *step: told.append(step)))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert told == [*((n, 7) for n in range(1, 8)), (3, 7), (6, 7), (7, 7), (7, 7)]


def test_a_text_that_ends_before(tmp_path: Path) -> None:
    text = "def add(a, b):\n    return a + b\n" * 20
    (tmp_path / "text.txt").write_text(text)
    options = {"dataset": "text", "dataset_options": {"path": str(tmp_path / "text.txt")}}
    found = evaluated("qplug:demo", windows=10_000, seq_len=32, **options)
    assert 2 < found.windows < 20
    assert (found.dataset, found.seq_len) == ("text", 32)
    assert found.perplexity < 10  # it says the same all over again


# --- what the user can mend ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"seq_len": 1025}, "--seq-len 1025: the model takes 1024 tokens at most"),
        ({"dataset": "demmo"}, "no dataset 'demmo'. Did you mean 'demo'?"),
        ({"dataset_options": {"x": 1}}, "dataset demo has no option 'x'"),
        ({"dataset": "text"}, "dataset text needs the option path"),
        ({"dataset": "text", "dataset_options": {"path": "nowhere.txt"}}, "nowhere.txt: "),
        ({"seq_len": 10**7}, "--seq-len 10000000: the model takes 1024 tokens at most"),
        ({"device": "nonsense"}, "--device nonsense: "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_evaluated(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(QplugError) as caught:
        evaluated("qplug:demo", **options)
    assert complaint in str(caught.value)


def test_a_folder_without_a_tokenizer(llama: Path) -> None:
    with pytest.raises(QplugError, match="its tokenizer does not load"):
        evaluated(llama)


# --- the command ---------------------------------------------------------------------------------


def test_the_command(cli: Callable[..., Result], folders: Callable[..., Path]) -> None:
    words = ("--seq-len", LENGTH, "--windows", 5)
    for model in ("qplug:demo", folders("W8A8")):
        wanted = evaluated(model)
        result = cli("eval", model, *words)
        told = f"{model}: perplexity {wanted.perplexity:.4f} (5 windows of 48 tokens of demo)\n"
        assert (result.exit_code, result.stdout, result.stderr) == (0, told, "")
        plain = json.loads(cli("eval", model, *words, "--json").stdout)
        assert plain.pop("perplexity") == pytest.approx(wanted.perplexity, rel=1e-9)
        assert plain == {"model": str(model), "dataset": "demo", "windows": 5, "seq_len": 48}


@pytest.mark.parametrize("words", [("--seq-len", 1), ("--windows", 0), ("--seq-len", "x")])
def test_usage(cli: Callable[..., Result], words: tuple[object, ...]) -> None:
    assert cli("eval", "qplug:demo", *words).exit_code == 2


def test_stdout_has_the_result_alone(start: Starter) -> None:
    """In a process of its own: what libraries print would be seen too."""
    words = ["eval", "qplug:demo", "--seq-len", LENGTH, "--windows", 5, "--json"]
    ended = start(*words).wait()
    wanted = evaluated("qplug:demo").perplexity
    assert json.loads(ended.stdout)["perplexity"] == pytest.approx(wanted, rel=1e-6)
    assert (ended.codes, ended.stderr) == ([0], "")
