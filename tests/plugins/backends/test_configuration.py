"""What ``quantization_config`` says is what was meant, by each engine's way of matching names."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from compressed_tensors.utils.match import match_name
from hypothesis import assume, given, settings

from qplug import ModelView, QplugError, Scheme, preset
from qplug_compressed_tensors.configuration import Configuration, patterns, write_config
from qplug_compressed_tensors.loader import Plain

# Parts that are parts of one another, as names of real models are.
PARTS = ("gate", "gate_proj", "up", "mlp", "proj", "attn", "experts", "0", "1", "12")
BLOCKS = tuple(f"model.layers.{number}" for number in (0, 1, 10))
OUTSIDE = ("lm_head", "proj", "model.proj", "model.vision.mlp.gate", "model.layers_norm.proj")

local_names = st.lists(st.sampled_from(PARTS), min_size=1, max_size=3).map(".".join)


@st.composite
def models(draw: st.DrawFn) -> ModelView:
    """Linears in three blocks, much alike, and some outside."""
    alike = draw(st.lists(local_names, min_size=1, max_size=5, unique=True))
    names = [f"{block}.{local}" for block in BLOCKS for local in alike]
    names += [f"{draw(st.sampled_from(BLOCKS))}.{draw(local_names)}" for _ in range(2)]
    names += draw(st.lists(st.sampled_from(OUTSIDE), unique=True))
    linears = dict.fromkeys(names, (128, 128))
    head = draw(st.sampled_from([None, "lm_head", "proj", "gate"]))
    return ModelView({}, "bfloat16", linears, frozenset(linears), BLOCKS, head)


@settings(max_examples=300)
@given(models(), st.data())
def test_patterns_match_what_is_wanted_and_nothing_else(
    model: ModelView, data: st.DataObject
) -> None:
    names = sorted(model.linears)
    wanted = data.draw(st.sets(st.sampled_from(names)))
    entries = patterns(wanted, names, BLOCKS)
    matched = {name for name in names if any(match_name(name, entry) for entry in entries)}
    assert matched == wanted
    # SGLang takes a plain entry as a part of a name.
    plain = [entry for entry in entries if not entry.startswith("re:")]
    assert {name for name in names if any(entry in name for entry in plain)} <= wanted


SCHEMES = (preset("W4A16"), preset("W8A16"), preset("W4A16").with_group_size(32), preset("W8A8"))


@settings(max_examples=300)
@given(models(), st.data(), st.sampled_from(["whole", "end", "part"]))
def test_what_is_written_is_read_back(model: ModelView, data: st.DataObject, plain: Plain) -> None:
    choice = st.sampled_from((None, *SCHEMES))
    chosen = {name: data.draw(choice) for name in model.linears if name != model.head}
    schemes: dict[str, Scheme] = {name: found for name, found in chosen.items() if found}
    assume(schemes)
    written = write_config(model, schemes)
    read = Configuration.parse(written, plain=plain)
    for name in model.linears:
        group = read.group(name)
        assert (group and group.scheme) == schemes.get(name), name
    if model.head is not None:
        assert read.ignored(model.head)
    floats = model.linears.keys() - schemes.keys()
    assert all(read.ignored(name) for name in floats)
    assert not any(read.ignored(name) for name in schemes)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: str(scheme.weights))
def test_one_scheme_is_one_group_for_all_linears(scheme: Scheme) -> None:
    names = [f"{block}.{part}" for block in BLOCKS for part in ("up", "down")]
    linears = dict.fromkeys(names, (128, 128))
    model = ModelView({}, "bfloat16", linears, frozenset(linears), BLOCKS, "lm_head")
    written = write_config(model, dict.fromkeys(names, scheme))
    (group,) = written["config_groups"].values()
    assert (group["targets"], written["ignore"]) == (["Linear"], ["lm_head"])


def test_routers_are_ignored_by_an_expression() -> None:
    # As a plain string, "mlp.gate" is a part of "mlp.gate_proj" to SGLang.
    names = [f"{block}.mlp.{part}" for block in BLOCKS for part in ("gate", "gate_proj")]
    linears = dict.fromkeys(names, (128, 128))
    model = ModelView({}, "bfloat16", linears, frozenset(linears), BLOCKS, None)
    quantized = {name: preset("W4A16") for name in names if name.endswith("gate_proj")}
    assert write_config(model, quantized)["ignore"] == [r"re:.*\.mlp\.gate$"]


@pytest.mark.parametrize(
    "damage",
    [
        {"quant_method": "gptq"},
        {"config_groups": {"group_0": {"weights": {}}}},
        {"config_groups": {"group_0": {"targets": ["Linear"], "weights": None}}},
        {"config_groups": {"group_0": {"targets": ["Linear"]}}},
        {"config_groups": None},
        {"config_groups": [1]},
    ],
    ids=str,
)
def test_what_no_engine_takes_is_one_line(damage: dict[str, object]) -> None:
    model = ModelView({}, "bfloat16", {"a.0.up": (8, 8)}, frozenset({"a.0.up"}), ("a.0",), None)
    config = {**write_config(model, {"a.0.up": preset("W8A8")}), **damage}
    with pytest.raises(QplugError):
        Configuration.parse(config)
