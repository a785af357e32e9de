"""What qplug asks of every algorithm, and what the paper says of this one."""

from __future__ import annotations

import torch
from qplug_magr.magr import MagR, Params, less_range

from qplug import preset
from qplug.numerics import dequantize, nearest, output_error
from qplug.testing import AlgorithmContract, tiny_block


class TestMagR(AlgorithmContract):
    algorithm = MagR
    schemes = ("W2A16", "W3A16", "W4A16", "W4A16_ASYM")


def test_the_proximal_operator_is_the_minimum() -> None:
    generator = torch.Generator().manual_seed(0)
    for price in (0.01, 0.5, 3.0, 100.0):
        v = torch.randn(5, 8, generator=generator)
        found = less_range(v, price)

        def cost(x: torch.Tensor, v: torch.Tensor = v, price: float = price) -> torch.Tensor:
            return 0.5 * (x - v).square().sum(-1) + price * x.abs().amax(-1)

        for _ in range(200):
            other = found + 0.05 * torch.randn(found.shape, generator=generator)
            assert (cost(found) <= cost(other) + 1e-5).all()


def test_a_price_above_all_weights_leaves_nothing() -> None:
    assert not less_range(torch.ones(2, 3), 3.0).any()
    assert torch.equal(less_range(torch.zeros(2, 3), 0.1), torch.zeros(2, 3))


def test_ranges_shrink_and_outputs_of_few_bits_gain() -> None:
    scheme = preset("W2A16").with_group_size(16)
    plain, block = tiny_block(scheme), tiny_block(scheme)
    MagR(Params(alpha=1e-3)).transform(block)
    total = {"plain": 0.0, "magr": 0.0}
    for group, other in zip(plain.groups, block.groups, strict=True):
        for was, now in zip(group.linears, other.linears, strict=True):
            assert torch.equal(block.original(now), was.weight)
            assert now.weight.abs().sum() < was.weight.abs().sum()
            for name, linear in (("plain", was), ("magr", now)):
                off = dequantize(nearest(linear)) - was.weight
                total[name] += output_error(off, group.gram)
    assert total["magr"] < 0.9 * total["plain"]
