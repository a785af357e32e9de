"""Inputs, linears and input groups without a model, and a tokenizer without a vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qplug import InputGroup, Linear, QuantArgs

MakeInputs = Callable[..., Tensor]
MakeLinear = Callable[..., Linear]
MakeGroup = Callable[..., InputGroup]


@pytest.fixture(scope="session")
def make_inputs() -> MakeInputs:
    """``make_inputs(tokens, width)``: rows as real layers read them, float32.

    Channels go together, a few are far larger than the others, and means are not zero.
    """

    def make(tokens: int, width: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        causes = torch.randn(tokens, max(1, width // 2), generator=generator)
        mix = torch.randn(max(1, width // 2), width, generator=generator)
        x = causes @ mix / (width // 2 + 1) ** 0.5
        x += 0.5 * torch.randn(tokens, width, generator=generator)
        x += 0.3 * torch.randn(width, generator=generator)
        large = torch.randperm(width, generator=generator)[: max(1, width // 16)]
        x[:, large] *= 8
        return x

    return make


@pytest.fixture(scope="session")
def make_linear() -> MakeLinear:
    """``make_linear(rows, width, args)``: random weights, a few of them large."""

    def make(
        rows: int,
        width: int,
        args: QuantArgs,
        *,
        activations: QuantArgs | None = None,
        name: str = "linear",
        seed: int = 0,
    ) -> Linear:
        generator = torch.Generator().manual_seed(seed + 1000)
        weight = torch.randn(rows, width, generator=generator) * 0.05
        weight *= torch.exp(0.5 * torch.randn(rows, width, generator=generator))
        return Linear(name, weight, args, activations)

    return make


@pytest.fixture(scope="session")
def make_group() -> MakeGroup:
    """``make_group(x, *linears)``: the group of ``linears`` that read ``x: [tokens, in]``."""

    def make(x: Tensor, *linears: Linear, scalable: bool = True) -> InputGroup:
        return InputGroup(
            linears=linears,
            gram=x.T @ x,
            mean=x.mean(0),
            mean_abs=x.abs().mean(0),
            low=x.amin(0),
            high=x.amax(0),
            sample=x.clone(),
            tokens=len(x),
            scalable=scalable,
            shiftable=False,
            after_norm=True,
        )

    return make


class CharacterTokenizer:
    """A token a character, so that what was tokenised can be read back from the ids."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(character) for character in text]


@pytest.fixture(scope="session")
def tokenizer() -> CharacterTokenizer:
    return CharacterTokenizer()
