"""Options mean the same from the command line, from YAML and from Python."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qplug import NoParams, Param, QplugError
from qplug.api.params import convert, fill, options, parse_pairs


@dataclass(frozen=True)
class Params:
    bits: Annotated[Literal[2, 3, 4, 8], Param("Bits per weight.")] = 4
    group_size: Annotated[int, Param("Columns.", min=-1, max=1024, also=("q_group_size",))] = 128
    damp: Annotated[float, Param("Dampening.", min=0, max=1, also=("percdamp",))] = 0.01
    act_order: Annotated[bool, Param("Order.")] = False
    version: Annotated[Literal["v1", "v2"], Param("Version.")] = "v1"
    label: Annotated[str, Param("Label.")] = ""
    file: Annotated[Path | None, Param("File.")] = None
    seed: Annotated[int | None, Param("Seed.")] = None


@dataclass(frozen=True)
class Needs:
    path: Annotated[Path, Param("Where the text is.")]


KINDS = {
    "bits": st.sampled_from([2, 3, 4, 8]),
    "group_size": st.integers(-1, 1024),
    "damp": st.floats(0, 1),
    "act_order": st.booleans(),
    "version": st.sampled_from(["v1", "v2"]),
    "label": st.text(),
    "file": st.none() | st.text("abc/._-", min_size=1).map(Path),
    "seed": st.none() | st.integers(),
}
some_params = st.builds(Params, **KINDS)


@given(some_params)
def test_what_python_gives_comes_back(params: Params) -> None:
    assert fill(Params, vars(params), "x") == params


@given(some_params)
def test_the_command_line_says_the_same(params: Params) -> None:
    words = [f"{name}={value}" for name, value in vars(params).items()]
    assert fill(Params, parse_pairs(words, "-o"), "x") == params


@given(some_params)
def test_yaml_says_the_same(params: Params) -> None:
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in vars(params).items()}
    assert fill(Params, yaml.safe_load(yaml.safe_dump(plain)), "x") == params


@given(some_params)
def test_values_keep_their_types(params: Params) -> None:
    filled = fill(Params, {k: str(v) for k, v in vars(params).items()}, "x")
    for name, value in vars(params).items():
        assert type(getattr(filled, name)) is type(value)


@given(st.sets(st.sampled_from(sorted(KINDS))), some_params)
def test_what_is_not_given_keeps_its_default(names: set[str], params: Params) -> None:
    filled = fill(Params, {name: getattr(params, name) for name in names}, "x")
    assert filled == dataclasses.replace(Params(), **{n: getattr(params, n) for n in names})


@given(st.text())
def test_any_word_gives_an_option_or_one_sentence(word: str) -> None:
    for name in KINDS:
        said = ""
        try:
            fill(Params, {name: word}, "algorithm x")
        except QplugError as error:
            said = str(error)
        assert not said or said.startswith(f"algorithm x: {name}={word}: must be ")


@pytest.mark.parametrize("key", ["group-size", "group_size", "q_group_size", "q-group-size"])
def test_hyphens_and_older_names_are_understood(key: str) -> None:
    assert fill(Params, {key: 64}, "x").group_size == 64


@pytest.mark.parametrize(
    ("word", "value"),
    [("true", True), ("Yes", True), ("ON", True), ("false", False), ("no", False), ("off", False)],
)
def test_words_for_yes_and_no(word: str, value: bool) -> None:
    assert fill(Params, {"act_order": word}, "x").act_order is value


@pytest.mark.parametrize("word", ["none", "None", "null", None])
def test_words_for_nothing(word: str | None) -> None:
    assert fill(Params, {"file": word, "seed": word}, "x") == Params()


@pytest.mark.parametrize(
    ("key", "value", "must"),
    [
        ("bits", "5", "one of 2, 3, 4, 8"),
        ("version", "v3", "one of v1, v2"),
        ("version", None, "one of v1, v2"),
        ("group_size", "-2", "int >= -1 <= 1024"),
        ("group_size", 1025, "int >= -1 <= 1024"),
        ("group_size", "many", "int >= -1 <= 1024"),
        ("group_size", 1.5, "int >= -1 <= 1024"),
        ("group_size", True, "int >= -1 <= 1024"),
        ("group_size", None, "int >= -1 <= 1024"),
        ("group_size", float("inf"), "int >= -1 <= 1024"),
        ("group_size", [128], "int >= -1 <= 1024"),
        ("damp", "1.01", "float >= 0 <= 1"),
        ("damp", "nan", "float >= 0 <= 1"),
        ("damp", float("nan"), "float >= 0 <= 1"),
        ("act_order", "maybe", "bool"),
        ("act_order", 1, "bool"),
        ("label", True, "str"),
        ("seed", "1.5", "int or none"),
        ("file", 7, "path or none"),
    ],
)
def test_a_wrong_value_is_refused_with_what_it_must_be(key: str, value: Any, must: str) -> None:
    with pytest.raises(QplugError) as no:
        fill(Params, {key: value}, "algorithm gptq")
    assert str(no.value) == f"algorithm gptq: {key}={value}: must be {must}"


@pytest.mark.parametrize("value", [None, ["a"], {"a": 1}])
def test_text_is_not_made_of_what_is_not_text(value: Any) -> None:
    with pytest.raises(QplugError, match="must be str"):
        fill(Params, {"label": value}, "x")


@pytest.mark.parametrize(
    ("value", "filled"), [(1, 1), ("1", 1), (1.0, 1), (-1, -1), (1024, 1024), ("0", 0)]
)
def test_whole_numbers_within_bounds(value: Any, filled: int) -> None:
    assert fill(Params, {"group_size": value}, "x").group_size == filled


def test_an_unknown_option_is_answered_with_the_known() -> None:
    with pytest.raises(QplugError) as no:
        fill(Params, {"group_sise": 64}, "algorithm gptq")
    assert str(no.value) == (
        "algorithm gptq has no option 'group_sise'. Did you mean 'group_size'? It has:"
        " bits, group_size, damp, act_order, version, label, file, seed"
    )
    with pytest.raises(QplugError, match=r"^dataset d has no option 'x'\. It has: none$"):
        fill(NoParams, {"x": 1}, "dataset d")


def test_an_option_and_its_older_name_at_once_are_refused() -> None:
    with pytest.raises(QplugError, match=r"^x: option 'damp' is given twice$"):
        fill(Params, {"percdamp": 0.1, "damp": 0.1}, "x")


def test_a_field_without_default_is_needed() -> None:
    with pytest.raises(
        QplugError, match=r"^dataset text needs the option path: Where the text is\.$"
    ):
        fill(Needs, {}, "dataset text")
    assert fill(Needs, {"path": "a/b"}, "x") == Needs(Path("a/b"))


def test_options_tell_what_a_field_is() -> None:
    told = {o.name: (o.type_name, o.optional, o.required, o.default) for o in options(Params)}
    assert told == {
        "bits": ("2|3|4|8", False, False, 4),
        "group_size": ("int >= -1 <= 1024", False, False, 128),
        "damp": ("float >= 0 <= 1", False, False, 0.01),
        "act_order": ("bool", False, False, False),
        "version": ("v1|v2", False, False, "v1"),
        "label": ("str", False, False, ""),
        "file": ("path or none", True, False, None),
        "seed": ("int or none", True, False, None),
    }
    assert [o.param.help for o in options(Needs)] == ["Where the text is."]
    assert [o.required for o in options(Needs)] == [True]
    assert options(NoParams) == []


def made_of(annotation: Any) -> type:
    return dataclasses.make_dataclass("P", [("x", annotation)], frozen=True)


@pytest.mark.parametrize("hint", [Optional[int], Union[int, None], int | None])  # noqa: UP007, UP045
def test_every_spelling_of_optional(hint: Any) -> None:
    (option,) = options(made_of(Annotated[hint, Param("X.")]))
    assert (option.kind, option.optional) == (int, True)


@pytest.mark.parametrize(
    ("annotation", "says"),
    [
        (int, r"P\.x must be Annotated"),
        (Annotated[int, "help"], r"P\.x must be Annotated"),
        (Annotated[list[int], Param("X.")], r"P\.x: list\[int\] cannot be an option"),
        (Annotated[int | str, Param("X.")], r"P\.x: int \| str cannot be an option"),
        (Annotated[Any, Param("X.")], r"P\.x: .*Any cannot be an option"),
        (Annotated[Literal[b"a"], Param("X.")], r"P\.x: <class 'bytes'> cannot be an option"),
    ],
)
def test_what_cannot_be_an_option_is_said_of_the_field(annotation: Any, says: str) -> None:
    with pytest.raises(TypeError, match=f"^{says}"):
        options(made_of(annotation))


@dataclass
class Thawed:
    x: Annotated[int, Param("X.")] = 1


@pytest.mark.parametrize("params", [Thawed, int])
def test_params_are_a_frozen_dataclass(params: type) -> None:
    with pytest.raises(TypeError, match=f"^{params.__name__} must be a frozen dataclass$"):
        options(params)


@given(st.dictionaries(st.text(min_size=1).filter(lambda k: "=" not in k), st.text()))
def test_pairs_are_split_at_the_first_equals_sign(pairs: dict[str, str]) -> None:
    assert parse_pairs([f"{k}={v}" for k, v in pairs.items()], "-o") == pairs


@pytest.mark.parametrize("word", ["bits", "=4", "="])
def test_a_word_that_is_no_pair(word: str) -> None:
    with pytest.raises(QplugError, match=f"^--dataset-opt {word}: write KEY=VALUE$"):
        parse_pairs([word], "--dataset-opt")


def test_a_wrong_choice_suggests_the_nearest() -> None:
    (option,) = (each for each in options(Choices) if each.name == "mode")
    with pytest.raises(QplugError, match=r"^o: must be one of search, fixed\. Did you mean 'sea"):
        convert(option, "serch", "o")
    with pytest.raises(QplugError, match=r"^o: must be one of search, fixed$"):
        convert(option, "xyz", "o")


@dataclass(frozen=True)
class Choices:
    mode: Annotated[Literal["search", "fixed"], Param("A mode.")] = "search"
