"""Each field of a recipe arrives in ``qplug.json``, whichever way it is said."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import yaml
from click.testing import Result

import qplug
from qplug import preset
from qplug.api.scheme import CACHES
from qplug.calibration.observers import OBSERVERS
from qplug.recipe import budget, recipe
from qplug.recipe.recipe import Calibration, Recipe
from qplug.recipe.spellings import CacheName
from qplug.recipe.words import RecipeWords, words

Cli = Callable[..., Result]


@dataclass(frozen=True)
class Said:
    """One field, another value than its default: as words, in a file, in Python, in qplug.json."""

    words: str
    file: Mapping[str, Any]
    python: Mapping[str, Any]
    recorded: Any


TEXT = Path(__file__)

#: All of these go together in one run.
TOGETHER = {
    "algorithms": Said(
        "--algo smoothquant+gptq",
        {"pipeline": [{"algorithm": "smoothquant", "options": {"alpha": 0.7}}, "gptq"]},
        {"algo": "smoothquant+gptq"},
        ["smoothquant", "gptq"],
    ),
    "algorithm_options": Said(
        "-o smoothquant.alpha=0.7",
        {},  # in the pipeline
        {"algorithm_options": {"smoothquant": {"alpha": "0.7"}}},
        {"smoothquant": {"alpha": "0.7"}},
    ),
    "scheme": Said(
        "--scheme W8A8_STATIC",
        {"scheme": "W8A8_STATIC"},
        {"scheme": "W8A8_STATIC"},
        preset("W8A8_STATIC").to_dict(),
    ),
    "backend": Said("--backend vllm", {"backend": "vllm"}, {"backend": "vllm"}, "vllm"),
    "backend_options": Said(
        "--backend-opt tp=2",
        {"backend_options": {"tp": 2}},
        {"backend_options": {"tp": 2}},
        {"tp": "2"},
    ),
    "overrides": Said(
        "--override *.down_proj=FP8",
        {"overrides": [{"pattern": "*.down_proj", "scheme": "FP8"}]},
        {"overrides": {"*.down_proj": "FP8"}},
        [["*.down_proj", preset("FP8").to_dict()]],
    ),
    "ignore": Said(
        "--ignore *.o_proj", {"ignore": ["*.o_proj"]}, {"ignore": ("*.o_proj",)}, ["*.o_proj"]
    ),
    "mtp": Said("--mtp drop", {"mtp": "drop"}, {"mtp": "drop"}, "drop"),
    "calibration.dataset": Said(
        "--dataset text", {"calibration": {"dataset": "text"}}, {"dataset": "text"}, "text"
    ),
    "calibration.options": Said(
        f"--dataset-opt path={TEXT}",
        {"calibration": {"options": {"path": str(TEXT)}}},
        {"dataset_options": {"path": TEXT}},
        {"path": TEXT.name},  # folders of this machine are recorded nowhere
    ),
    "calibration.samples": Said("--samples 3", {"calibration": {"samples": 3}}, {"samples": 3}, 3),
    "calibration.seq_len": Said(
        "--seq-len 24", {"calibration": {"seq_len": 24}}, {"seq_len": 24}, 24
    ),
    "calibration.propagate": Said(
        "--propagate float",
        {"calibration": {"propagate": "float"}},
        {"propagate": "float"},
        "float",
    ),
    "calibration.experts": Said(
        "--experts all",
        {"calibration": {"experts": "all"}},
        {"experts": "all"},
        "all",
    ),
    "calibration.observer": Said(
        "--observer histogram",
        {"calibration": {"observer": "histogram"}},
        {"observer": "histogram"},
        "histogram",
    ),
    "calibration.observer_options": Said(
        "--observer-opt bins=64",
        {"calibration": {"observer_options": {"bins": 64}}},
        {"observer_options": {"bins": 64}},
        {"bins": "64"},
    ),
    "calibration.batch_size": Said(
        "--batch-size 2", {"calibration": {"batch_size": 2}}, {"batch_size": 2}, 2
    ),
    "calibration.sampling": Said(
        "--sampling windows",
        {"calibration": {"sampling": "windows"}},
        {"sampling": "windows"},
        "windows",
    ),
    "calibration.mask": Said(
        "--mask prompts", {"calibration": {"mask": "prompts"}}, {"mask": "prompts"}, "prompts"
    ),
    "kv_cache": Said(
        "--kv-cache fp8", {"kv_cache": "fp8"}, {"kv_cache": "fp8"}, CACHES["fp8"].to_dict()
    ),
    "seed": Said("--seed 7", {"seed": 7}, {"seed": 7}, 7),
}

#: No engine rounds so: a run of its own.
ALONE = {
    "use_qtorch": Said("--use-qtorch", {"use_qtorch": True}, {"use_qtorch": True}, True),
}
ALONE_WITH = Said(
    "--scheme WE2M1A16 --backend fake",
    {"scheme": "WE2M1A16", "backend": "fake"},
    {"scheme": "WE2M1A16", "backend": "fake"},
    None,
)

WAYS = ("command line", "file", "beside a file", "Python")
Recorded = Mapping[str, Mapping[str, Any]]


@pytest.fixture(scope="module")
def rounder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A package called qtorch that leaves numbers as they are."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "qtorch").mkdir()
    (folder / "qtorch" / "__init__.py").write_text("")
    (folder / "qtorch" / "quant.py").write_text("def float_quantize(x, *p, **n):\n    return x\n")
    metadata = folder / "qtorch-0.3.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: qtorch\nVersion: 0.3.0\n")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("qtorch", "qtorch.quant"):
            patch.delitem(sys.modules, name, raising=False)
        patch.syspath_prepend(str(folder))
        yield


@pytest.fixture(scope="module")
def recorded(
    tmp_path_factory: pytest.TempPathFactory, cli: Cli, rounder: None
) -> Callable[[str, str], Any]:
    """``recorded(way, "calibration.samples")``: what ``qplug.json`` of such a run says."""
    runs: dict[tuple[str, bool], dict[str, Any]] = {}

    def run(way: str, alone: bool) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("run")
        said = [*ALONE.values(), ALONE_WITH] if alone else list(TOGETHER.values())
        words = [word for one in said for word in one.words.split()]
        model, out = "qplug:demo", folder / "out"
        if way == "Python":
            merged = {name: value for one in said for name, value in one.python.items()}
            qplug.quantize(model, out, **merged)
            return dict(json.loads((out / "qplug.json").read_text()))
        file = folder / "f.yml"
        if way == "command line":
            result = cli("quantize", "--algo", "rtn", model, "--out", out, *words)
        elif way == "file":
            file.write_text(
                yaml.safe_dump(_whole(said, {"model": model, "export": [{"out": str(out)}]}))
            )
            result = cli("quantize", "--config", file)
        else:
            file.write_text(yaml.safe_dump({"model": model, "export": [{"out": str(out)}]}))
            result = cli("quantize", "--config", file, *words)
        assert result.exit_code == 0, result.output
        return dict(json.loads((out / "qplug.json").read_text()))

    def value(way: str, field: str) -> Any:
        alone = field in ALONE
        if (way, alone) not in runs:
            runs[way, alone] = run(way, alone)
        found: Any = runs[way, alone]["recipe"]
        for key in field.split("."):
            found = found[key]
        return found

    return value


def _whole(said: list[Said], start: dict[str, Any]) -> dict[str, Any]:
    """The file that says all of ``said``."""
    for one in said:
        for key, value in one.file.items():
            if isinstance(value, dict):
                start[key] = {**start.get(key, {}), **value}
            else:
                start[key] = value
    return start


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("field", [*TOGETHER, *ALONE])
def test_a_field_arrives(field: str, way: str, recorded: Callable[[str, str], Any]) -> None:
    wanted = {**TOGETHER, **ALONE}[field].recorded
    found = recorded(way, field)
    if field.endswith("options"):  # words are text, values in files and Python have types
        found = json.loads(json.dumps(found), parse_int=str, parse_float=str)
    assert found == wanted


def test_no_field_is_left_out() -> None:
    # A budget is spent when a run records its recipe: see tests/run/test_choose.py.
    parts = {field.name for field in fields(Recipe)} - {"calibration", "budget"}
    inner = {f"calibration.{field.name}" for field in fields(Calibration)}
    assert {*TOGETHER, *ALONE} == parts | inner


def test_words_for_type_checkers_are_those_of_the_fields() -> None:
    known = {word.name: word for word in words()}
    assert list(RecipeWords.__annotations__) != []
    assert set(RecipeWords.__annotations__) == set(known)
    typed = get_type_hints(RecipeWords, localns={**vars(budget), **vars(recipe)})
    for name, word in known.items():
        if word.param.spelling is None and name != "group_size":
            assert _without_none(typed[name]) == _loose(_without_none(word.key.kind)), name


def _without_none(hint: Any) -> Any:
    members = [member for member in get_args(hint) if member is not type(None)]
    return members[0] if type(None) in get_args(hint) and len(members) == 1 else hint


def _loose(hint: Any) -> Any:
    """The type that Python callers may give for a type of a field."""
    if get_origin(hint) is Mapping:
        key, value = get_args(hint)
        nested = Mapping[str, Any] if get_origin(value) is Mapping else Any
        return Mapping[key, nested]  # type: ignore[valid-type]
    return Sequence[str] if hint == tuple[str, ...] else hint


def test_names_that_recipes_list_are_those_there_are() -> None:
    assert get_args(CacheName) == tuple(CACHES)
    assert get_args(recipe.ObserverName) == tuple(OBSERVERS)
