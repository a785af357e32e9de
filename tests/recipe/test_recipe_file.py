"""The native recipe: read, refused with its line, written, and told as JSON Schema."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st

from qplug import PRESETS, QplugError, QuantArgs, preset
from qplug.api.scheme import CACHES
from qplug.recipe.files import ReadJob
from qplug.recipe.pipeline import refuse_strangers
from qplug.recipe.recipe import (
    SAMPLINGS,
    STAGES,
    Calibration,
    Export,
    Job,
    Measurement,
    Recipe,
)
from qplug.recipe.recipe_file import read_recipe, schema, write_recipe
from qplug.recipe.spelled_scheme import spelled
from qplug.recipe.words import changed_job
from qplug.recipe.yaml_tree import read_yaml

Read = Callable[..., ReadJob]
Cli = Callable[..., Result]

WHOLE = """
    model: qplug:demo
    pipeline:
      - algorithm: awq
        options: {clip: false, ratios: 10}
      - gptq
    scheme: {preset: W4A16, group_size: 64}
    overrides:
      - {pattern: "*down_proj", scheme: W8A16}
      - pattern: re:.*o_proj
        scheme:
          weights: {dtype: int6, strategy: channel}
          activations: {dtype: int8, strategy: token, dynamic: true}
    ignore: ["*.0.*"]
    calibration: {dataset: text, options: {path: a.txt}, samples: 16, sampling: windows}
    seed: 3
    export:
      - {out: one, backend: vllm}
      - {out: two, backend: hf}
    eval:
      - {at: [pretrain, quantized], seq_len: 128, windows: 4}
"""


def test_a_whole_recipe(read_text: Read) -> None:
    read = read_text(WHOLE)
    assert read.warnings == ()
    assert read.job == Job(
        model="qplug:demo",
        recipe=Recipe(
            algorithms=("awq", "gptq"),
            algorithm_options={"awq": {"clip": False, "ratios": 10}},
            scheme=preset("W4A16").with_group_size(64),
            overrides=(
                ("*down_proj", preset("W8A16")),
                (
                    "re:.*o_proj",
                    spelled(QuantArgs("int6", "channel"), QuantArgs("int8", "token", dynamic=True)),
                ),
            ),
            ignore=("*.0.*",),
            calibration=Calibration("text", {"path": "a.txt"}, 16, sampling="windows"),
            seed=3,
        ),
        exports=(Export(Path("one"), "vllm"), Export(Path("two"), "hf")),
        measurements=(Measurement(("pretrain", "quantized"), seq_len=128, windows=4),),
    )


def test_what_is_not_said_has_its_default(read_text: Read) -> None:
    assert read_text("model: qplug:demo").job == Job(model="qplug:demo", recipe=Recipe())


def test_an_observer_where_older_recipes_have_it(read_text: Read) -> None:
    old = read_text("seed: 1\nobserver: histogram\ncalibration: {samples: 4}")
    new = read_text("seed: 1\ncalibration: {samples: 4, observer: histogram}")
    assert old.job == new.job
    assert [warning.partition("f.yml:")[2] for warning in old.warnings] == [
        "2: observer: move it: calibration: {observer: histogram}"
    ]
    assert read_text("observer: histogram").job.recipe.calibration.observer == "histogram"
    with pytest.raises(QplugError, match=":1: observer: 'mean' is wrong; allowed: minmax, mov"):
        read_text("observer: mean")


def test_an_export_has_the_backend_of_the_recipe_unless_it_names_one(read_text: Read) -> None:
    job = read_text(
        "backend: vllm\nbackend_options: {tp: 2}\nexport:\n- {out: one}\n"
        "- {out: two, options: {gpu: sm90}}\n- {out: three, backend: hf}"
    ).job
    told = [(r.backend, r.backend_options) for r in map(job.recipe_for, job.exports)]
    assert told == [("vllm", {"tp": 2}), ("vllm", {"tp": 2, "gpu": "sm90"}), ("hf", {})]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("pipline: [awq]", r":1: pipline: unknown key. Did you mean 'pipeline'\?; allowed: model,"),
        ("pipeline: awq", ":1: pipeline: 'awq' is wrong; allowed: a list"),
        ("pipeline: [awq, awq]", ":1: pipeline: --algo awq"),
        ("pipeline:\n- awq\n- quip", r":3: pipeline\[1\]: no algorithm 'quip'"),
        ("pipeline:\n- algorithm: awq\n  options: {clp: 1}", r":2: pipeline\[0\]: .* 'clp'. Did"),
        ("pipeline: [4]", r"pipeline\[0\]: 4 is wrong; allowed: a string or a mapping of algor"),
        ("scheme: W4", ":1: scheme: no scheme 'W4'"),
        (
            "scheme: {preset: W4A16, weights: {dtype: int4, strategy: group}}",
            "needs either preset or",
        ),
        ("scheme: {weights: {dtype: int4}}", "weights: the required key 'strategy' is missing"),
        (
            "scheme: {weights: {dtype: int4, strategy: row}}",
            "strategy: 'row' is wrong; allowed: te",
        ),
        ("scheme: {weights: {dtype: int4, strategy: group}}", "scheme: .*does not go with group_s"),
        ("scheme: {weights: {dtype: int9, strategy: channel}}", "there is no number format 'int9'"),
        ("overrides:\n- {pattern: x, scheme: W4}", r":2: overrides\[0\].scheme: no scheme 'W4'"),
        ("calibration: {samples: many}", "calibration.samples: 'many' is wrong; allowed: a whole"),
        (
            "calibration: {samples: 0}",
            ":1: calibration.samples: 0 is wrong; allowed: a number of 1",
        ),
        ("calibration: {sampling: all}", "sampling: 'all' is wrong; allowed: dataset, windows"),
        ("calibration: {dataset: c5}", ":1: calibration: no dataset 'c5'. There are: c4"),
        ("export:\n- {backend: vllm}", r":2: export\[0\]: the required key 'out' is missing"),
        ("export:\n- {out: x, backend: trt}", r":2: export\[0\]: no backend 'trt'"),
        ("eval:\n- {at: [later]}", r":2: eval\[0\].at\[0\]: 'later' is wrong; allowed: pretrain,"),
        ("eval:\n- {at: quantized}", "at: 'quantized' is wrong; allowed: a list"),
        ("seed: 1.5", "seed: 1.5 is wrong; allowed: a whole number"),
        ("seed: true", "seed: True is wrong"),
        ("use_qtorch: 1", "use_qtorch: 1 is wrong; allowed: True, False"),
    ],
)
def test_wrong_recipes(read_text: Read, text: str, complaint: str) -> None:
    with pytest.raises(QplugError, match=complaint):
        read_text(text)


# --- there and back -------------------------------------------------------------------------------

WORDS = st.text("abcxyz.*:-\u00e9 '\"", min_size=1).filter(lambda word: word.strip() == word)
SCALARS = st.one_of(st.booleans(), st.integers(-9, 9), st.floats(-9, 9), WORDS)
WEIGHTS = st.one_of(
    st.builds(
        QuantArgs,
        st.sampled_from(["int2", "int4", "int8"]),
        st.just("group"),
        st.sampled_from([32, 128]),
        symmetric=st.booleans(),
    ),
    st.builds(QuantArgs, st.sampled_from(["int3", "e4m3", "e5m2"]), st.just("channel")),
    st.just(QuantArgs("e4m3", "block", block=(128, 64))),
)
INPUTS = st.one_of(
    st.none(),
    st.builds(
        QuantArgs, st.sampled_from(["int8", "e4m3"]), st.just("token"), dynamic=st.just(True)
    ),
)
SCHEMES = st.one_of(
    st.sampled_from(sorted(PRESETS)).map(preset), st.builds(spelled, WEIGHTS, INPUTS)
)
RECIPES = st.builds(
    Recipe,
    algorithms=st.sampled_from([("rtn",), ("awq", "gptq"), ("smoothquant",)]),
    scheme=SCHEMES,
    backend=WORDS,
    backend_options=st.dictionaries(WORDS, SCALARS, max_size=1),
    overrides=st.lists(st.tuples(WORDS, SCHEMES), max_size=2).map(tuple),
    ignore=st.lists(WORDS, max_size=2).map(tuple),
    calibration=st.builds(
        Calibration,
        st.from_regex(r"[a-z][a-z0-9-]{0,9}", fullmatch=True),
        st.dictionaries(WORDS, SCALARS, max_size=2),
        st.integers(1, 999),
        st.integers(1, 999),
        st.sampled_from(["quantized", "float"]),
        st.sampled_from(["minmax", "histogram"]),
        st.dictionaries(WORDS, SCALARS, max_size=1),
        st.one_of(st.none(), st.integers(1, 9)),
        st.sampled_from(SAMPLINGS),
        st.sampled_from(["none", "prompts"]),
    ),
    kv_cache=st.sampled_from([None, CACHES["fp8"]]),
    use_qtorch=st.booleans(),
    seed=st.integers(0, 99),
).map(lambda r: replace(r, algorithm_options={r.algorithms[-1]: {"x": 1}} if r.seed else {}))
JOBS = st.builds(
    Job,
    model=st.one_of(st.none(), WORDS),
    recipe=RECIPES,
    exports=st.lists(st.builds(Export, WORDS.map(Path), WORDS), max_size=2).map(tuple),
    measurements=st.lists(
        st.builds(
            Measurement,
            st.lists(st.sampled_from(STAGES), max_size=3).map(tuple),
            WORDS,
            st.dictionaries(WORDS, SCALARS, max_size=1),
            st.integers(2, 99),
            st.one_of(st.none(), st.integers(1, 9)),
        ),
        max_size=2,
    ).map(tuple),
)


@given(RECIPES)
def test_a_recipe_survives_json(recipe: Recipe) -> None:
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@given(JOBS)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, job: Job) -> None:
    file = tmp_path_factory.getbasetemp() / "written.yml"
    text = write_recipe(job)
    file.write_text(text, encoding="utf-8")
    assert read_recipe(read_yaml(file), []) == job
    assert list(problems(schema(), yaml.safe_load(text))) == []


def test_an_llmc_file_converted_says_the_same(
    read_text: Read, llmc: Callable[..., str], tmp_path: Path, cli: Cli
) -> None:
    text = llmc(
        method="Awq",
        special="trans_version: v1\nweight_clip: False",
        calib="name: c4\ndownload: True\nn_samples: 9\nseq_len: 99\nbs: 1\npreproc: pileval_awq",
        evaluate="eval_pos: [pretrain, fake_quant]\nname: c4\ndownload: True\nseq_len: 64\nbs: 1",
        save="save_vllm: True\nsave_trans: True\nsave_path: there",
        more="ignored_layers: {block_ids: [0-3], layer_names: [mlp.up_proj]}\n",
    )
    read = read_text(text)
    converted = cli("config", "convert", tmp_path / "f.yml")
    assert converted.exit_code == 0, converted.output
    assert read_text(converted.stdout, "native.yml").job == read.job
    assert list(problems(schema(), yaml.safe_load(converted.stdout))) == []


# --- the JSON Schema ------------------------------------------------------------------------------

TYPES: dict[str, Any] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
    "object": dict,
    "array": list,
}


def problems(rule: Mapping[str, Any], value: Any, path: str = "") -> list[str]:
    """What JSON Schema has against ``value``, for the words of it that qplug uses."""
    known = {"$schema", "title", "description", "default", "type", "properties", "required"}
    assert set(rule) <= known | {"additionalProperties", "enum", "items", "anyOf", "minimum"}
    found: list[str] = []
    if "anyOf" in rule:
        tried = [problems(member, value, path) for member in rule["anyOf"]]
        return [] if [] in tried else [f"{path}: fits none: {tried}"]
    if "enum" in rule and value not in rule["enum"]:
        found.append(f"{path}: {value} is not in {rule['enum']}")
    if "type" in rule:
        names = rule["type"] if isinstance(rule["type"], list) else [rule["type"]]
        fits = any(
            isinstance(value, TYPES[name]) and not (name != "boolean" and isinstance(value, bool))
            for name in names
        )
        if not fits:
            return [f"{path}: {value!r} is no {names}"]
    if "minimum" in rule and value is not None and value < rule["minimum"]:
        found.append(f"{path}: {value} is less than {rule['minimum']}")
    if isinstance(value, dict):
        extra = rule.get("additionalProperties", True)
        for key, inner in value.items():
            if key in rule.get("properties", {}):
                found += problems(rule["properties"][key], inner, f"{path}.{key}")
            elif extra is False:
                found.append(f"{path}: {key} is not known")
            elif extra is not True:
                found += problems(extra, inner, f"{path}.{key}")
        found += [f"{path}: no {key}" for key in rule.get("required", ()) if key not in value]
    if isinstance(value, list):
        for number, inner in enumerate(value):
            found += problems(rule["items"], inner, f"{path}[{number}]")
    return found


def test_the_schema_takes_what_is_right_and_no_more(cli: Cli) -> None:
    told = json.loads(cli("config", "schema").stdout)
    assert told == json.loads(json.dumps(schema()))
    assert told["$schema"].startswith("https://json-schema.org/draft/2020-12")
    whole = yaml.safe_load(WHOLE)
    assert problems(told, whole) == []
    for key in told["properties"]:
        assert told["properties"][key]["description"]
        assert problems(told, {key: {"no": {"such": 1}}}) != [], key
    assert problems(told, {"pipline": []}) == [": pipline is not known"]
    assert problems(told, {**whole, "seed": True}) != []
    assert problems(told, {**whole, "eval": [{"at": ["later"]}]}) != []


def test_examples_are_valid(cli: Cli) -> None:
    files = sorted((Path(__file__).parents[2] / "examples").glob("*.yml"))
    assert files
    for file in files:
        checked = cli("config", "check", file)
        assert checked.exit_code == 0, checked.output
        assert re.search(": valid recipe: ", checked.output)
        assert problems(schema(), yaml.safe_load(file.read_text())) == []


# --- changed by the command line ------------------------------------------------------------------


def test_what_is_given_beside_the_file_wins(read_text: Read) -> None:
    job = changed_job(
        replace(read_text(WHOLE).job, exports=(Export(Path("one"), "vllm", {"x": 1}),)),
        {
            "scheme": "W8A16",
            "algorithm_options": {"awq": {"ratios": 5}},
            "overrides": {"*up_proj": "W4A16"},
            "ignore": ("*.1.*",),
            "samples": 4,
            "seed": 9,
        },
        model="other",
        out=Path("here"),
    )
    recipe = job.recipe
    assert (job.model, recipe.seed, recipe.scheme) == ("other", 9, preset("W8A16"))
    assert [(e.out, job.recipe_for(e)) for e in job.exports] == [(Path("here"), recipe)]
    assert (recipe.backend, recipe.backend_options) == ("vllm", {"x": 1})
    assert recipe.algorithm_options == {"awq": {"clip": False, "ratios": 5}}
    assert [pattern for pattern, _ in recipe.overrides] == ["*down_proj", "re:.*o_proj", "*up_proj"]
    assert recipe.ignore == ("*.0.*", "*.1.*")
    assert (recipe.calibration.dataset, recipe.calibration.samples) == ("text", 4)


def test_another_pipeline_keeps_the_options_that_still_mean_something(read_text: Read) -> None:
    recipe = changed_job(read_text(WHOLE).job, {"algo": "rtn"}).recipe
    assert (recipe.algorithms, recipe.algorithm_options) == (("rtn",), {})
    kept = changed_job(read_text(WHOLE).job, {"algo": "smoothquant+awq"}).recipe
    assert kept.algorithm_options == {"awq": {"clip": False, "ratios": 10}}
    strange = changed_job(Job(), {"algorithm_options": {"awq": {"clip": True}}}).recipe
    with pytest.raises(QplugError, match="awq is not in --algo"):
        refuse_strangers(strange.algorithms, strange.algorithm_options)


def test_another_component_has_options_of_its_own(read_text: Read) -> None:
    job = read_text(WHOLE).job
    data = changed_job(job, {"dataset": "demo"}).recipe.calibration
    assert (data.dataset, data.options, data.sampling) == ("demo", {}, "dataset")
    same = changed_job(job, {"dataset": "text"}).recipe.calibration
    assert same == job.recipe.calibration
    more = changed_job(job, {"dataset_options": {"order": "sequential"}}).recipe
    assert more.calibration.options == {"path": "a.txt", "order": "sequential"}
    job = changed_job(Job(), {"observer": "histogram", "observer_options": {"bins": 9}})
    assert job.recipe.calibration.observer_options == {"bins": 9}
    ranges = changed_job(job, {"observer": "moving-average"}).recipe.calibration
    assert (ranges.observer, ranges.observer_options) == ("moving-average", {})


def test_another_group_or_backend(read_text: Read) -> None:
    job = replace(read_text(WHOLE).job, exports=())
    changed = changed_job(job, {"group_size": 32, "backend": "vllm"}, out=Path("x"))
    assert changed.recipe.scheme == preset("W4A16").with_group_size(32)
    assert (changed.exports, changed.recipe.backend) == ((Export(Path("x")),), "vllm")
    one = replace(job, exports=(Export(Path("x"), "vllm", {"tp": 2}),))
    other = changed_job(one, {"backend": "sglang"})
    assert (other.recipe.backend, other.recipe.backend_options) == ("sglang", {})
    with pytest.raises(QplugError, match="needs a folder to write: give --out"):
        changed_job(job, {"backend": "vllm"})
    with pytest.raises(QplugError, match="names several folders"):
        changed_job(read_text(WHOLE).job, {}, out=Path("x"))


def test_a_word_that_there_is_not() -> None:
    with pytest.raises(TypeError, match="a recipe has no field for smaples"):
        changed_job(Job(), {"smaples": 3})
