"""Names, patterns and exceptions: which layer gets which scheme."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qplug import PRESETS, ModelView, QplugError, QuantArgs, preset
from qplug.api.scheme import Scheme
from qplug.recipe.assign import assign, matches
from qplug.recipe.recipe import Calibration, Recipe
from qplug.recipe.spellings import parse_algorithms, parse_cache, parse_scheme

Q, GATE, UP = (f"model.layers.{{}}.{local}" for local in ("attn.q", "mlp.gate", "mlp.up"))
LINEARS = [name.format(layer) for layer in (0, 1, 10) for name in (Q, GATE, UP)]
MODEL = ModelView(
    config={},
    dtype="bfloat16",
    linears=dict.fromkeys([*LINEARS, "lm_head"], (128, 128)),
    quantizable=frozenset(LINEARS) - {name for name in LINEARS if name.endswith("gate")},
    blocks=("model.layers.0", "model.layers.1", "model.layers.10"),
    head="lm_head",
)
UNGATED = [name for name in LINEARS if not name.endswith("gate")]


def assigned(**parts: Any) -> dict[str, str]:
    recipe = Recipe(("rtn",), preset("W4A16"), "sglang", **parts)
    return {name: scheme.name for name, scheme in assign(recipe, MODEL).items()}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("rtn", ("rtn",)),
        ("quarot+gptq", ("quarot", "gptq")),
        (" quarot + gptq ", ("quarot", "gptq")),
    ],
)
def test_algorithms(text: str, names: tuple[str, ...]) -> None:
    assert parse_algorithms(text) == names


@pytest.mark.parametrize("text", ["", "+", "rtn+", "+rtn", "a++b", "rtn+rtn", " "])
def test_algorithms_that_are_none(text: str) -> None:
    with pytest.raises(QplugError, match="name one algorithm, or several"):
        parse_algorithms(text)


def test_a_scheme_and_its_group() -> None:
    assert parse_scheme("w4a16") == PRESETS["W4A16"]
    assert parse_scheme("W4A16", 32).weights.group_size == 32
    whole_row = parse_scheme("W4A16", -1).weights
    assert (whole_row.strategy, whole_row.group_size) == ("channel", None)
    assert parse_scheme("W8A8", -1) == PRESETS["W8A8"]


@pytest.mark.parametrize(
    ("name", "size", "complaint"),
    [
        ("W4", None, "no scheme 'W4'"),
        ("W4A16", 0, "must be positive"),
        ("W4A16", -2, "must be positive"),
        ("W8A8", 128, "one scale for each row"),
        ("FP8_BLOCK", 64, "no group size to choose"),
        ("FP8_DYNAMIC", -1, "no group size to choose"),
    ],
)
def test_a_scheme_that_is_none(name: str, size: int | None, complaint: str) -> None:
    with pytest.raises(QplugError, match=complaint):
        parse_scheme(name, size)


@pytest.mark.parametrize(
    ("pattern", "hits"),
    [
        ("model.layers.1.attn.q", [Q.format(1)]),
        ("model.layers.1.*", [name.format(1) for name in (Q, GATE, UP)]),
        ("*.q", [Q.format(layer) for layer in (0, 1, 10)]),
        ("*.layers.?.mlp.up", [UP.format(0), UP.format(1)]),
        ("*.layers.[01].mlp.up", [UP.format(0), UP.format(1)]),
        ("*.MLP.*", []),
        ("q", []),
        ("re:.*q", [Q.format(layer) for layer in (0, 1, 10)]),
        (r"re:model\.layers\.1\..*", [name.format(1) for name in (Q, GATE, UP)]),
        ("re:attn", []),
        ("re:", []),
    ],
)
def test_patterns(pattern: str, hits: list[str]) -> None:
    assert [name for name in LINEARS if matches(pattern, name)] == hits


def test_a_pattern_that_is_none() -> None:
    with pytest.raises(QplugError, match=r"^re:\*: not a regular expression: "):
        matches("re:*", "x")


def test_all_but_head_and_routers_by_default() -> None:
    assert assigned() == dict.fromkeys(UNGATED, "W4A16")
    assert list(assigned()) == UNGATED  # the model's order


def test_ignored_layers_stay_float() -> None:
    found = assigned(ignore=("*.q", "re:.*layers.10.*"))
    assert list(found) == [UP.format(0), UP.format(1)]


def test_a_head_can_be_ignored_though_it_is_float_anyway() -> None:
    assert assigned(ignore=("lm_head",)) == assigned()


def test_overrides() -> None:
    overrides = (("*.mlp.*", preset("W8A16")), ("*.0.mlp.up", preset("W8A8")))
    assert assigned(overrides=overrides) == {
        Q.format(0): "W4A16",
        GATE.format(0): "W8A16",  # a router, but asked for
        UP.format(0): "W8A8",  # the later one wins
        Q.format(1): "W4A16",
        GATE.format(1): "W8A16",
        UP.format(1): "W8A16",
        Q.format(10): "W4A16",
        GATE.format(10): "W8A16",
        UP.format(10): "W8A16",
    }
    assert assigned(overrides=overrides[::-1])[UP.format(0)] == "W8A16"


def test_ignore_is_stronger_than_override() -> None:
    found = assigned(ignore=("*.up",), overrides=(("*", preset("W8A16")),))
    assert found == {name: "W8A16" for name in MODEL.linears if not name.endswith(".up")}


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        ({"ignore": ("*.q", "*.nope")}, "--ignore *.nope: matches no linear layer"),
        ({"overrides": (("nope", preset("W8A16")),)}, "--override nope: matches no linear layer"),
        ({"ignore": ("*",)}, "nothing is left to quantize"),
    ],
)
def test_patterns_that_lead_nowhere(parts: dict[str, Any], complaint: str) -> None:
    with pytest.raises(QplugError) as caught:
        assigned(**parts)
    assert complaint in str(caught.value)


@pytest.mark.parametrize("scheme", PRESETS.values(), ids=PRESETS)
def test_a_recipe_survives_json(scheme: Scheme) -> None:
    recipe = Recipe(
        algorithms=("quarot", "gptq"),
        scheme=scheme,
        backend="vllm",
        overrides=(("*.q", preset("FP8_BLOCK")),),
        ignore=("*.up",),
        algorithm_options={"gptq": {"damp": 0.01, "cache": Path("folder") / "file"}},
        backend_options={"x": None, "path": Path("file")},
        calibration=Calibration(observer="moving-average", observer_options={"momentum": 0.5}),
        kv_cache=parse_cache("fp8"),
        seed=7,
    )
    plain = recipe.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert Scheme.from_dict(plain["scheme"]) == scheme
    assert plain["algorithm_options"] == {"gptq": {"damp": 0.01, "cache": "folder/file"}}
    assert plain["seed"] == 7
    assert plain["calibration"]["observer"] == "moving-average"
    assert plain["calibration"]["observer_options"] == {"momentum": 0.5}
    assert QuantArgs.from_dict(plain["kv_cache"]) == QuantArgs("e4m3", "tensor")
