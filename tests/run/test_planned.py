"""The calibration data of a run: which process reads it, and what the others do meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

from qplug.calibration.samples import Samples
from qplug.checkpoint.locate import DEMO, find_model
from qplug.checkpoint.open import open_checkpoint
from qplug.machine.processes import Processes
from qplug.machine.session import Session
from qplug.model.view import model_view
from qplug.recipe.recipe import Recipe
from qplug.registry.registry import Registry
from qplug.run import planned
from qplug.run.stages import Stages
from qplug.run.watchers import Watchers

T = TypeVar("T")


@pytest.mark.parametrize(("rank", "expected"), [(0, ["data"]), (1, ["import", "data"])])
def test_other_processes_import_what_the_first_one_needs_for_the_data(
    rank: int, expected: list[str], registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    class OneOfTwo(Processes):
        count = 2

        def from_first(self, make: Callable[[], T]) -> T:
            done.append("data")
            return samples  # type: ignore[return-value]

    samples = Samples(torch.zeros(2, 8, dtype=torch.int64))
    processes = OneOfTwo()
    processes.rank = rank
    session = Session(registry, processes=processes)
    stages = Stages(Recipe(algorithms=("gptq",)), session)
    view = model_view(open_checkpoint(find_model(DEMO)))
    monkeypatch.setattr(planned, "import_tokenizers", lambda: done.append("import"))
    watchers = Watchers(session, lambda *_: None)
    assert planned._samples(DEMO, stages, view, session, watchers) is samples
    assert done == expected
