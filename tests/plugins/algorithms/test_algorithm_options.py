"""The options of the calibrated algorithms, under their own names and under LLMC's."""

from __future__ import annotations

from typing import Any

import pytest

from qplug import QplugError
from qplug.api.params import fill, options
from qplug.api.scheme import preset
from qplug.machine.session import Session
from qplug.recipe.recipe import Recipe
from qplug.registry.registry import Registry
from qplug.run.stages import Stages


def filled(algorithm: str, values: dict[str, Any]) -> Any:
    """The parameters that the algorithm gets in a run."""
    recipe = Recipe(
        algorithms=(algorithm,),
        scheme=preset("W4A16"),
        backend="vllm",
        algorithm_options={algorithm: values},
    )
    return Stages(recipe, Session(Registry.installed())).pipeline[0].params


@pytest.mark.parametrize(
    ("algorithm", "theirs", "ours"),
    [
        ("gptq", {"percdamp": 0.02}, {"damp": 0.02}),
        ("gptq", {"percdamp": "0.02"}, {"damp": 0.02}),
        ("gptq", {"actorder": False}, {"act_order": False}),
        ("gptq", {"actorder": "false"}, {"act_order": False}),
        ("gptq", {"blocksize": 64}, {"block_size": 64}),
        (
            "gptq",
            {"percdamp": 0.5, "actorder": False, "blocksize": 1},
            {"damp": 0.5, "act_order": False, "block_size": 1},
        ),
        ("quarot", {"rotate_mode": "random"}, {"rotation": "random"}),
        ("hqq", {"iters": 5}, {"iterations": 5}),
        ("awq", {"trans": False}, {"scale": False}),
        ("awq", {"trans_version": "v1"}, {"version": "v1"}),
        ("awq", {"weight_clip": False}, {"clip": False}),
        ("awq", {"weight-clip": "no"}, {"clip": False}),
        (
            "awq",
            {"trans": True, "trans_version": "v1", "weight_clip": False},
            {"scale": True, "version": "v1", "clip": False},
        ),
    ],
)
def test_names_of_llmc(algorithm: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    assert filled(algorithm, theirs) == filled(algorithm, ours)
    assert filled(algorithm, theirs) != filled(algorithm, {}) or ours == {"scale": True}
    for name, value in ours.items():
        assert getattr(filled(algorithm, theirs), name) == value


@pytest.mark.parametrize(
    ("algorithm", "values", "message"),
    [
        ("gptq", {"percdamp": 0.1, "damp": 0.1}, "option 'damp' is given twice"),
        ("gptq", {"percdamp": -0.1}, "percdamp=-0.1: must be float >= 0 <= 1"),
        ("gptq", {"percdamp": 2}, "percdamp=2: must be float >= 0 <= 1"),
        ("gptq", {"blocksize": 0}, "blocksize=0: must be int >= 1"),
        ("gptq", {"blocksize": 1.5}, "blocksize=1.5: must be int >= 1"),
        ("gptq", {"actorder": "maybe"}, "actorder=maybe: must be bool"),
        ("gptq", {"act-ordre": True}, "has no option 'act-ordre'. Did you mean 'act"),
        ("awq", {"trans_version": "v3"}, "trans_version=v3: must be one of v1, v2"),
        ("awq", {"ratios": 0}, "ratios=0: must be int >= 1"),
        ("awq", {"clip_smallest": 0}, "clip_smallest=0: must be float >= 0.05 <= 1"),
        ("awq", {"weight_clip": 2}, "weight_clip=2: must be bool"),
        ("awq", {"percdamp": 0.1}, "algorithm awq has no option 'percdamp'"),
    ],
)
def test_what_is_not_allowed(algorithm: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(QplugError) as caught:
        filled(algorithm, values)
    assert str(caught.value).startswith(f"algorithm {algorithm}")
    assert message in str(caught.value)


@pytest.mark.parametrize("algorithm", ["hqq", "quarot", "awq", "gptq", "smoothquant", "osplus"])
def test_every_option_says_what_it_does(algorithm: str) -> None:
    kind = Registry.installed().algorithms[algorithm]
    for option in options(kind.Params):
        assert option.param.help.endswith(".")
        assert not option.required
    assert fill(kind.Params, {}, "") == kind.Params()
