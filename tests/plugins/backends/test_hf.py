"""The hf backend: a float folder that computes what the model did, ready to be quantized."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import qplug
from qplug import QuantArgs
from qplug.cli.main import main
from qplug.numerics.scales import clip_to_scale, minmax_scale
from qplug.reading.load import load

DATA = {"samples": 4, "seq_len": 64, "device": "cpu"}


@pytest.fixture(scope="module")
def transformed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hf") / "out"
    options = {"awq": {"clip": False}}
    return qplug.quantize(
        "qplug:demo", out, algo="awq", backend="hf", algorithm_options=options, **DATA
    ).out


def logits(folder: Path | str) -> torch.Tensor:
    tokens = torch.arange(5, 69)[None]
    with torch.no_grad():
        return load(str(folder))(input_ids=tokens).logits


def test_what_it_computes_is_what_the_model_computed(transformed: Path) -> None:
    was, now = logits("qplug:demo"), logits(transformed)
    assert (now - was).norm() / was.norm() < 0.02  # of bfloat16 weights that were rescaled


def test_weights_are_rescaled_and_nothing_is_quantized(transformed: Path) -> None:
    from qplug.checkpoint.locate import find_model
    from qplug.checkpoint.open import open_checkpoint

    was, now = open_checkpoint(find_model("qplug:demo")), open_checkpoint(transformed)
    assert {n: t.spec for n, t in was.tensors.items()} == {
        n: t.spec for n, t in now.tensors.items()
    }
    assert "quantization_config" not in now.config
    names = [f"model.layers.{number}.self_attn.q_proj.weight" for number in range(4)]
    ratios = [now.read(name).float() / was.read(name).float() for name in names]
    within = [ratio.std(0).median() for ratio in ratios]
    assert max(within) < 0.01  # a factor for each column
    # One may be best as it is; which, depends on the text, and this on the version of Python.
    assert any(ratio.mean(0).std() > 3 * off for ratio, off in zip(ratios, within, strict=True))
    manifest = json.loads((transformed / "qplug.json").read_text())
    assert manifest["layers"] == {}
    assert {*names} <= {*manifest["rewritten"]}
    assert manifest["recipe"]["calibration"]["propagate"] == "float"
    card = (transformed / "README.md").read_text()
    assert "transformed by qplug" in card
    assert "none is quantized" in card


def test_another_run_takes_the_folder(transformed: Path, tmp_path: Path) -> None:
    """LLMC's two steps: the second sees the scaled weights, and no word of the first."""
    result = qplug.quantize(str(transformed), tmp_path / "two", backend="sglang", device="cpu")
    options = {"awq": {"clip": False}}
    whole = qplug.quantize(
        "qplug:demo",
        tmp_path / "one",
        algo="awq",
        algorithm_options=options,
        propagate="float",
        **DATA,
    )
    errors = [(result.errors[name], whole.errors[name]) for name in whole.errors]
    assert all(abs(two - one) < 0.002 for two, one in errors)  # masters were rounded to bfloat16


def test_without_data_it_is_a_copy(tmp_path: Path) -> None:
    from qplug.checkpoint.locate import find_model

    result = CliRunner().invoke(
        main, ["quantize", "qplug:demo", "--backend", "hf", "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.output
    assert "float" in result.output
    weights = "model.safetensors"
    copied = (tmp_path / "out" / weights).read_bytes()
    assert copied == (find_model("qplug:demo") / weights).read_bytes()
    assert CliRunner().invoke(main, ["verify", str(tmp_path / "out")]).exit_code == 0


def test_a_run_that_was_killed_goes_on(transformed: Path, tmp_path: Path) -> None:
    """To the same bytes: what feeds the next block is what is stored."""

    class Killed(BaseException):
        pass

    def stop(done: int, total: int, name: str, loss: float | None) -> None:
        if name.endswith("layers.1"):
            raise Killed

    def run(**options: object) -> qplug.run.quantize.Result:  # type: ignore[name-defined]
        return qplug.quantize(
            "qplug:demo",
            tmp_path / "out",
            algo="awq",
            backend="hf",
            algorithm_options={"awq": {"clip": False}},
            **DATA,
            **options,
        )

    with pytest.raises(Killed):
        run(watch=stop)
    assert run().resumed > 0
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (transformed / name).read_bytes()


ARGS = [
    QuantArgs("int4", "group", 32),
    QuantArgs("int4", "group", 32, symmetric=False),
    QuantArgs("int8", "channel"),
    QuantArgs("e4m3", "tensor"),
    QuantArgs("e4m3", "block", block=(16, 16)),
]


@pytest.mark.parametrize("args", ARGS, ids=lambda args: f"{args.dtype} {args.strategy}")
def test_what_a_clip_cuts_off_is_cut_off(args: QuantArgs) -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    scale, zero = minmax_scale(weight, args)
    half = clip_to_scale(weight.clone(), scale / 2, zero, args)
    assert not torch.equal(half, weight)
    again, same_zero = minmax_scale(half, args)
    # An asymmetric range ends on codes, so it may be half a code shorter than what was cut to.
    slack = 0.5 / 15 if zero is not None else 1e-6
    assert torch.allclose(again, scale / 2, rtol=slack + 1e-6)
    assert zero is None or (same_zero.float() - zero.float()).abs().max() <= 1
    assert torch.equal(half[half == weight], weight[half == weight])
    assert (half == weight).float().mean() > 0.3


def test_clips_of_awq_reach_the_folder(tmp_path: Path) -> None:

    options = {"awq": {"scale": False, "clip_smallest": 0.5}}
    out = qplug.quantize(
        "qplug:demo", tmp_path / "out", algo="awq", backend="hf", algorithm_options=options, **DATA
    ).out
    from qplug.checkpoint.locate import find_model
    from qplug.checkpoint.open import open_checkpoint

    was, now = open_checkpoint(find_model("qplug:demo")), open_checkpoint(out)
    name = "model.layers.0.mlp.up_proj.weight"
    cut = was.read(name) != now.read(name)
    assert 0 < cut.float().mean() < 0.1
    assert (now.read(name).abs() <= was.read(name).abs())[cut].all()
    manifest = json.loads((out / "qplug.json").read_text())
    assert name in manifest["rewritten"]
