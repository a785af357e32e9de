"""Gram matrices of experts that see few tokens: the sums by hand, and fresh tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qplug import InputGroup, Linear, QuantArgs
from qplug.numerics import completed_experts, completed_gram, completed_grams

MakeInputs = Callable[..., Tensor]
MakeLinear = Callable[..., Linear]
MakeGroup = Callable[..., InputGroup]

ARGS = QuantArgs("int4", "group", 16)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=1e-5)


def test_the_layer_completes_experts_that_read_its_tokens() -> None:
    own = torch.tensor([[9.0, 3.0], [3.0, 18.0]])
    grams = torch.stack([own, torch.zeros(2, 2)])
    layer = torch.tensor([[4.0, 2.0], [2.0, 8.0]])
    found = completed_grams(grams, torch.tensor([8, 0]), layer, 3.0)
    # 3 * sqrt(2 * 8) = 12 tokens; without any of its own as for one: 3 * sqrt(2).
    close(found[0], own + 12 * torch.tensor([[4.0, 1.5], [1.5, 8.0]]))
    close(found[1], 3 * 2**0.5 * torch.tensor([[4.0, 1.5], [1.5, 8.0]]))
    assert torch.equal(grams[0], own)  # the statistics stay as they are
    assert not grams[1].any()


def test_other_experts_are_completed_without_correlations() -> None:
    own = torch.tensor([[48.0, 8.0], [8.0, 16.0]])
    grams = torch.stack([own, torch.zeros(2, 2)])
    found = completed_grams(grams, torch.tensor([8, 0]), None, 3.0)
    # The mean of 6 and 2 counts as 16 tokens, their own as 8.
    even = torch.tensor([(6 * 8 + 4 * 16) / 24, (2 * 8 + 4 * 16) / 24])
    close(found[0], own + 6 * even.diag())
    close(found[1], 1.5 * 2**0.5 * torch.eye(2))


def test_many_tokens_leave_little_to_complete(make_inputs: MakeInputs) -> None:
    x = make_inputs(100, 32)
    gram = x.T @ x
    change = [
        (completed_grams(gram[None] * k, torch.tensor([100 * k]), gram / 50, 2.0)[0] / k - gram)
        for k in (1, 100, 10000)
    ]
    norms = [float(part.norm() / gram.norm()) for part in change]
    assert norms[0] == pytest.approx(10 * norms[1], rel=1e-3)
    assert norms[1] == pytest.approx(10 * norms[2], rel=1e-2)


def test_scales_of_channels_pass_through(make_inputs: MakeInputs) -> None:
    """A channel that is large is not taken for one that says much."""
    x = make_inputs(64, 32).double()
    scale = torch.logspace(-1, 1, 32, dtype=torch.float64)

    def completed(x: Tensor) -> Tensor:
        return completed_grams((x[:9].T @ x[:9])[None], torch.tensor([9]), x.T @ x / 64, 2.0)[0]

    torch.testing.assert_close(completed(x * scale), completed(x) * scale[:, None] * scale)


def layer_of(
    make_inputs: MakeInputs, make_linear: MakeLinear, make_group: MakeGroup
) -> tuple[InputGroup, InputGroup]:
    """A group that two experts and a shared expert read, and the last linear of expert 1."""
    x = make_inputs(200, 32)
    names = ("mlp.shared.gate", "mlp.experts.0.gate", "mlp.experts.1.gate")
    shared, first, second = (make_linear(8, 32, ARGS, name=name) for name in names)
    by_expert = (make_group(x[:190], first), make_group(x[190:], second))
    whole = replace(make_group(x, shared, first, second), by_expert=by_expert)
    inner = make_group(x[190:, :16], make_linear(8, 16, ARGS, name="mlp.experts.1.down"))
    return whole, replace(inner, experts="mlp.experts")


def test_groups_of_experts_are_told_from_others(
    make_inputs: MakeInputs, make_linear: MakeLinear, make_group: MakeGroup
) -> None:
    whole, inner = layer_of(make_inputs, make_linear, make_group)
    shared, first, second = whole.by_tokens
    assert torch.equal(completed_gram([shared], whole, 2.0)[0], shared.gram)
    for part in (first, second):
        wanted = completed_grams(
            part.gram[None], torch.tensor([part.tokens]), whole.gram / 200, 2.0
        )
        assert torch.equal(completed_gram([part], whole, 2.0), wanted)
        assert torch.equal(completed_gram([part], whole, 0.0)[0], part.gram)
    wanted = completed_grams(inner.gram[None], torch.tensor([10]), None, 2.0)
    assert torch.equal(completed_gram([inner], inner, 2.0), wanted)
    dense = make_group(make_inputs(5, 32), make_linear(8, 32, ARGS))
    assert torch.equal(completed_gram([dense], dense, 2.0)[0], dense.gram)


def test_a_layer_that_no_token_reached_completes_nothing(
    make_linear: MakeLinear, make_group: MakeGroup
) -> None:
    x = torch.zeros(1, 32)
    part = make_group(x, make_linear(8, 32, ARGS))
    part.tokens = 0
    whole = replace(part, by_expert=(part,))
    assert not completed_gram([part], whole, 2.0).any()


def test_experts_with_fewer_tokens_than_channels_are_noted(
    make_inputs: MakeInputs, make_linear: MakeLinear, make_group: MakeGroup
) -> None:
    whole, inner = layer_of(make_inputs, make_linear, make_group)
    assert [*completed_experts([whole, inner])] == [
        "mlp.experts: fewer tokens than channels reached 1; statistics of the layer complete theirs"
    ]
    assert [*completed_experts([make_group(make_inputs(5, 32), make_linear(8, 32, ARGS))])] == []
