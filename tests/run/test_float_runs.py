"""Runs with formats that no engine serves: measured through the fake backend, refused by others.

And rounding by the package qtorch: against a stand-in that remembers its calls, and the package
itself where it can be imported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import qplug
from qplug import QplugError, QuantArgs, Scheme
from qplug.api.scheme import FLOAT_MAX, FLOATS, all_finite_max
from qplug.numerics.activations import fake_quantize_activations
from qplug.numerics.qtorch import require_qtorch
from qplug.numerics.rounding import code_dtype, round_codes, round_floats

if TYPE_CHECKING:
    from click.testing import Result

    Cli = Callable[..., Result]
    Contents = Callable[[Path], dict[str, bytes | None]]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("backend", ["vllm", "sglang", "compressed-tensors"])
@pytest.mark.parametrize(
    "options", [{"scheme": "WE2M1A16"}, {"overrides": {"*.mlp.*": "WE2M1A16"}}], ids=str
)
def test_engines_refuse_what_they_do_not_serve(
    options: dict[str, Any], backend: str, llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(QplugError) as refused:
        qplug.quantize(str(llama), tmp_path / "out", backend=backend, **options)
    assert str(refused.value) == f"{backend}: the format has no layout for WE2M1A16 (e2m1)"
    assert list(tmp_path.iterdir()) == [llama]


def test_floats_are_measured_by_fake(tmp_path: Path) -> None:
    perplexities, errors = {}, {}
    for scheme in ("WE3M2A16", "WE2M1A16", "WE2M1AE5M2", "WE2M1AE2M1", "W4AE4M3", "W4AE1M1"):
        out = tmp_path / scheme
        result = qplug.quantize("qplug:demo", out, scheme=scheme, backend="fake")
        errors[scheme] = result.errors
        perplexities[scheme] = qplug.evaluate(str(out), windows=4, seq_len=128).perplexity
        assert qplug.verify(str(out)).ok
    assert perplexities["WE3M2A16"] < perplexities["WE2M1A16"]
    # Inputs count: their format alone tells these apart.
    assert errors["WE2M1AE5M2"] == errors["WE2M1AE2M1"]
    assert perplexities["WE2M1AE5M2"] * 1.02 < perplexities["WE2M1AE2M1"]
    assert perplexities["W4AE4M3"] * 1.02 < perplexities["W4AE1M1"]


def test_what_is_stored_is_on_the_grid(tmp_path: Path) -> None:
    qplug.quantize("qplug:demo", tmp_path / "out", scheme="WE2M1A16", backend="fake")
    model = qplug.load(str(tmp_path / "out"))
    weight = model.get_submodule("model.layers.0.mlp.up_proj").weight.detach()
    groups = weight.view(-1, 128)
    sizes = groups.abs() / groups.abs().amax(1, keepdim=True) * 6
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    off = (sizes[..., None] - grid).abs().amin(-1)
    assert off.max() < 6 * 2.0**-7  # the product of code and scale is stored in bfloat16


@pytest.mark.parametrize(
    ("algo", "scheme"), [("awq+gptq", "WE2M1A16"), ("smoothquant+gptq", "WE3M2AE5M2")]
)
def test_calibrated_algorithms_take_them(algo: str, scheme: str, tmp_path: Path) -> None:
    result = qplug.quantize(
        "qplug:demo",
        tmp_path / "out",
        algo=algo,
        scheme=scheme,
        backend="fake",
        samples=4,
        seq_len=64,
        algorithm_options={"awq": {"ratios": 2, "clip_steps": 2}} if "awq" in algo else {},
    )
    assert all(0 < loss < 0.5 for loss in result.losses.values())


# --- qtorch ---------------------------------------------------------------------------------------

#: A stand-in: it remembers how it is called, and gives back twos, which every format has.
STAND_IN = """
calls = []

def float_quantize(x, *positions, **names):
    calls.append((x.dtype, positions, names))
    return x * 0 + 2
"""


def forget_qtorch() -> dict[str, Any]:
    names = [name for name in sys.modules if name.partition(".")[0] == "qtorch"]
    return {name: sys.modules.pop(name) for name in names}


@pytest.fixture
def without_qtorch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    known = forget_qtorch()
    monkeypatch.setitem(sys.modules, "qtorch", None)  # to import it raises ModuleNotFoundError
    yield
    monkeypatch.undo()
    sys.modules.update(known)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package called qtorch, in place of what is installed; a test may change it."""
    known, folder = forget_qtorch(), tmp_path / "site"
    (folder / "qtorch").mkdir(parents=True)
    (folder / "qtorch-0.3.0.dist-info").mkdir()
    metadata = folder / "qtorch-0.3.0.dist-info" / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: qtorch\nVersion: 0.3.0\n")
    (folder / "qtorch" / "__init__.py").write_text("")
    (folder / "qtorch" / "quant.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(folder))
    yield folder / "qtorch" / "quant.py"
    forget_qtorch()
    sys.modules.update(known)


def calls() -> list[tuple[torch.dtype, tuple[Any, ...], dict[str, Any]]]:
    found: list[tuple[torch.dtype, tuple[Any, ...], dict[str, Any]]] = sys.modules[
        "qtorch.quant"
    ].calls
    return found


@pytest.mark.usefixtures("stand_in")
def test_it_is_qtorch_that_is_asked() -> None:
    args = QuantArgs("e4m3", "channel", use_qtorch=True)
    codes = round_floats(torch.ones(3), args)
    assert (codes.tolist(), codes.dtype) == ([2, 2, 2], torch.bfloat16)
    codes, values = round_codes(torch.ones(3), torch.full((3,), 0.5), None, args)
    assert (codes.tolist(), values.tolist()) == ([2, 2, 2], [1, 1, 1])
    inputs = QuantArgs("e5m2", "token", dynamic=True, use_qtorch=True)
    fake_quantize_activations(torch.ones(2, 3, dtype=torch.bfloat16), inputs)
    asked = {"exp": 4, "man": 3, "rounding": "nearest"}
    wanted = [(torch.float32, (), asked), (torch.float32, (), asked)]
    assert calls() == [*wanted, (torch.float32, (), {**asked, "exp": 5, "man": 2})]


@pytest.mark.usefixtures("stand_in")
def test_a_run_with_qtorch_says_so(
    cli: Cli, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = (
        "quantize",
        "--algo",
        "rtn",
        llama,
        "--scheme",
        "W4AE4M3",
        "--override",
        "*.q_proj=WE2M1A16",
    )
    result = cli(*words, "--backend", "fake", "--use-qtorch", "--out", out)
    assert result.exit_code == 0, result.output
    assert {names["exp"] for _, _, names in calls()} == {2}  # weights of W4AE4M3 are integers
    told = json.loads((out / "qplug.json").read_text())
    assert told["versions"]["qtorch"] == "0.3.0"
    schemes = {plain["name"]: Scheme.from_dict(plain) for plain in told["schemes"]}
    assert schemes["WE2M1A16"].weights.use_qtorch
    assert not schemes["W4AE4M3"].weights.use_qtorch
    inputs = schemes["W4AE4M3"].activations
    assert inputs is not None
    assert inputs.use_qtorch
    # The folder is measured with qtorch too.
    calls().clear()
    model = qplug.load(str(out))
    model(input_ids=torch.tensor([[1, 2, 3]]))
    assert {(names["exp"], names["man"]) for _, _, names in calls()} == {(4, 3)}
    forget_qtorch()
    monkeypatch.setitem(sys.modules, "qtorch", None)
    with pytest.raises(QplugError, match="use_qtorch needs the package qtorch: pip install"):
        qplug.load(str(out))
    qplug.load(str(out), quantize_activations=False)


@pytest.mark.usefixtures("without_qtorch")
def test_without_qtorch_nothing_is_begun(cli: Cli, tmp_path: Path, llama: Path) -> None:
    words = (
        "quantize",
        "--algo",
        "rtn",
        llama,
        "--scheme",
        "FP8_DYNAMIC",
        "--backend",
        "fake",
        "--use-qtorch",
    )
    result = cli(*words, "--out", tmp_path / "out")
    sentence = "use_qtorch needs the package qtorch: pip install 'qplug[qtorch]'"
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (1, f"Error: {sentence}")
    assert list(tmp_path.iterdir()) == [llama]


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        ("raise RuntimeError('Ninja is required\\nmore')", "RuntimeError: Ninja is required; it"),
        ("import no_such_thing", "ModuleNotFoundError: No module named 'no_such_thing'; it comp"),
    ],
)
def test_a_qtorch_that_does_not_compile(stand_in: Path, broken: str, sentence: str) -> None:
    stand_in.write_text(broken)
    with pytest.raises(QplugError) as refused:
        require_qtorch()
    assert str(refused.value).startswith(f"use_qtorch: qtorch does not load: {sentence}")
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("backend", ["vllm", "sglang", "compressed-tensors"])
def test_engines_refuse_qtorch(backend: str, tmp_path: Path, llama: Path) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(QplugError) as refused:
        qplug.quantize(
            str(llama), tmp_path / "out", scheme="FP8_DYNAMIC", backend=backend, use_qtorch=True
        )
    told = "engines do not round as qtorch does; measure it with --backend fake"
    assert str(refused.value) == f"{backend}: use_qtorch: {told}"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.usefixtures("stand_in")
def test_a_float_folder_rounds_nothing(tmp_path: Path, llama: Path) -> None:
    """What an algorithm transformed with qtorch in mind is stored, and measured, as it is."""
    out = tmp_path / "out"
    qplug.quantize(str(llama), out, scheme="FP8_DYNAMIC", backend="hf", use_qtorch=True)
    assert calls() == []
    assert json.loads((out / "qplug.json").read_text())["layers"] == {}


def test_integers_are_nothing_for_qtorch(tmp_path: Path) -> None:
    with pytest.raises(QplugError, match="use_qtorch: W4A16 has no float format to round"):
        qplug.quantize("qplug:demo", tmp_path / "out", backend="fake", use_qtorch=True)
    with pytest.raises(QplugError, match="use_qtorch: int8 is not a float format"):
        QuantArgs("int8", "channel", use_qtorch=True)
    with pytest.raises(QplugError, match="use_qtorch: e8m7 has no largest value in qtorch"):
        QuantArgs("e8m7", "channel", use_qtorch=True)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def real_qtorch() -> None:
    try:
        require_qtorch()
    except QplugError as error:
        pytest.skip(str(error))


def every_bfloat16() -> Tensor:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = patterns.view(torch.bfloat16).float()
    return values[values.isfinite()]


@pytest.mark.usefixtures("real_qtorch")
@pytest.mark.parametrize(
    "dtype", [name for name, (e, m) in FLOATS.items() if e in (2, 3, 4, 5) and m]
)
def test_the_package_rounds_as_told(dtype: str) -> None:
    """Ties away from zero, and codes without NaN; else it is the rounding of qplug's own."""
    by_qtorch = QuantArgs(dtype, "channel", use_qtorch=True)
    values = every_bfloat16()
    found = round_floats(values.clone(), by_qtorch).float()
    own = round_floats(values.clone(), QuantArgs(dtype, "channel")).float()
    top, widest = FLOAT_MAX[dtype], all_finite_max(*FLOATS[dtype])
    differs = found != own
    assert (found[values.abs() > widest].abs() == widest).all()
    inside = differs & (values.abs() <= top)
    # Where they differ, one is as near as the other, and qtorch's is the larger.
    near, far = (own - values)[inside].double(), (found - values)[inside].double()
    assert torch.equal(near.abs(), far.abs())
    assert (found[inside].abs() > own[inside].abs()).all()
    if dtype == "e4m3":
        assert found[values == 17].tolist() == [18]
        assert found.max() == 480
        assert code_dtype(by_qtorch) == torch.bfloat16
