"""A run builds its hollow model once, whatever asks for it, and only if it needs one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qplug.checkpoint.locate import DEMO, find_model
from qplug.model import skeleton
from qplug.model.skeleton import Skeleton
from qplug.run.quantize import quantize

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[PreTrainedModel]:
    """The hollow models that were built so far."""
    models: list[PreTrainedModel] = []
    build = skeleton.build

    def counted(*args: Any, **kwargs: Any) -> PreTrainedModel:
        models.append(build(*args, **kwargs))
        return models[-1]

    monkeypatch.setattr(skeleton, "build", counted)
    return models


@pytest.mark.parametrize("algo", ["rtn", "gptq"])
def test_a_run_builds_one_hollow_model(
    algo: str, built: list[PreTrainedModel], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(find_model(DEMO), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "of_its_own": 1}))
    quantize(str(model), tmp_path / "out", algo=algo, samples=1, seq_len=8)
    assert len(built) == 1


@pytest.mark.parametrize(("algo", "count"), [("rtn", 0), ("gptq", 1)])
def test_a_run_that_only_rounds_builds_none_of_a_plain_model(
    algo: str, count: int, built: list[PreTrainedModel], tmp_path: Path
) -> None:
    quantize(DEMO, tmp_path / "out", algo=algo, samples=1, seq_len=8)
    assert len(built) == count


def test_a_model_that_was_taken_is_built_again(built: list[PreTrainedModel]) -> None:
    of_demo = Skeleton(find_model(DEMO))
    taken = of_demo.take()
    assert built == [taken]
    assert of_demo.model() is of_demo.model() is not taken


def test_names_are_those_of_the_given_tensors(built: list[PreTrainedModel]) -> None:
    of_demo = Skeleton(find_model(DEMO))
    some = ["model.norm.weight", "lm_head.weight"]
    assert of_demo.names(some) is of_demo.names(reversed(some))
    assert "model.norm.weight" in of_demo.names(some).of_parameter
    assert of_demo.names(some) is not of_demo.names(some[:1])
    assert len(built) == 1
