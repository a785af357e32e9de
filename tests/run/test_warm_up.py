"""The first uses of a GPU beside imports: what is used, and how the thread ends."""

from __future__ import annotations

import threading

import pytest
import torch

from qplug import PRESETS
from qplug.machine.session import Session
from qplug.recipe.recipe import Recipe
from qplug.registry.registry import Registry
from qplug.run.stages import Stages
from qplug.run.warm_up import beside, first_uses, warmed_up

CPU = torch.device("cpu")


def thread_is_there() -> bool:
    return any(thread.name == "qplug-warm-up" for thread in threading.enumerate())


@pytest.mark.parametrize("scheme", sorted(PRESETS))
def test_every_first_use_works(scheme: str) -> None:
    for use in first_uses([PRESETS[scheme].weights], frozenset({"searches", "solves"}), CPU):
        use()


def test_an_algorithm_that_neither_searches_nor_solves_needs_less() -> None:
    grids = [PRESETS["W4A16"].weights]
    all_uses = [*first_uses(grids, frozenset({"searches", "solves"}), CPU)]
    assert len([*first_uses(grids, frozenset(), CPU)]) == len(all_uses) - 2


def test_an_error_does_not_end_the_uses_after_it() -> None:
    done = threading.Event()

    def fail() -> None:
        raise RuntimeError("no compiler")

    with beside([fail, done.set]):
        assert done.wait(10)


def test_the_end_waits_for_the_use_that_was_begun_and_for_no_other() -> None:
    begun, may_end, made = threading.Event(), threading.Event(), []

    def first() -> None:
        begun.set()
        may_end.wait(10)
        made.append("first")

    with beside([first, lambda: made.append("second")]):
        assert begun.wait(10)
        threading.Timer(0.1, may_end.set).start()
    assert made == ["first"]
    assert not thread_is_there()


def test_a_cpu_is_not_warmed_up(registry: Registry) -> None:
    session = Session(registry)
    with warmed_up(Stages(Recipe(algorithms=("awq",)), session), session):
        assert not thread_is_there()
