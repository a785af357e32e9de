"""Estimates the divergence of the model that each scheme of each decision would cause.

``fisher`` takes one pass forwards and backwards. Near the float model, the KL divergence of the
predictions ``p`` is ``u' F u / 2``, where ``u`` is the change of the logits and
``F = diag(p) - p p'`` the Fisher information. That is half of the expected square of ``n' u`` for
random directions ``n`` of covariance ``F``. To first order, ``n' u`` is the gradient of
``n' logits`` by the output of a linear times the error of the output, summed over tokens and
channels. The estimate leaves out products of two tokens, whose errors hardly correlate.

``divergence`` computes the model with one decision in one scheme, and measures the divergence.

Static inputs have scales that cover all samples: see ``static_scales``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from qplug.api.groups import dequantize
from qplug.api.scheme import Scheme
from qplug.calibration.samples import Samples
from qplug.checkpoint.names import is_within, relative_name
from qplug.choosing.decisions import Decision
from qplug.choosing.float_passes import FloatPasses, Passed, Variant
from qplug.choosing.static_scales import StaticScales, scale_for, static_scales
from qplug.model.rounding_hooks import InputRounding
from qplug.numerics.activations import fake_quantize_activations
from qplug.numerics.rounding import round_to_nearest

#: The estimated divergence, in nats a token, by decision and scheme; None stands for float weights.
Losses = Mapping[Decision, Mapping["Scheme | None", float]]

#: Called with the decisions or reads of blocks that are done, and with all of them.
Watch = Callable[[int, int], None]

#: Variants of a block that pass through the later blocks together, in tokens.
_TOKENS_AT_ONCE = 8192


def fisher(
    passes: FloatPasses,
    options: Mapping[Decision, Sequence[Scheme | None]],
    samples: Samples,
    batch_size: int,
    *,
    seed: int,
    watch: Watch,
) -> dict[Decision, dict[Scheme | None, float]]:
    """The losses by gradients; weights are rounded to nearest."""
    of_linear = {name: decision for decision in options for name in decision.linears}
    losses = {d: dict.fromkeys(schemes, 0.0) for d, schemes in options.items()}
    generator = torch.Generator(passes.device).manual_seed(seed)
    batches = samples.batches(batch_size)
    scales = static_scales(passes, options, batches)

    def visit(name: str, passed: Passed) -> None:
        decision = of_linear.get(name)
        if decision is None:
            return
        for scheme in options[decision]:
            if scheme is not None:
                inputs = scheme.activations
                scale = None if inputs is None else scale_for(scales, name, inputs)
                losses[decision][scheme] += _half_square(passed, scheme, scale)

    passes.backwards(batches, partial(_in_random_direction, generator), visit, watch)
    tokens = max(1, samples.count)
    return {d: {s: loss / tokens for s, loss in each.items()} for d, each in losses.items()}


def _in_random_direction(generator: torch.Generator, samples: Samples, logits: Tensor) -> Tensor:
    """The sum over tokens of ``n' logits``, where ``n`` is normal with the Fisher's covariance.

    Tokens that the model itself predicts, ``n = onehot - p``, would have the same covariance; where
    ``p`` is peaked, they are rarely others than the likeliest, and the estimate varies more.
    """
    with torch.no_grad():
        p = logits.softmax(-1)
        root = torch.randn(p.shape, generator=generator, device=p.device) * p.sqrt()
        directions = root - p * root.sum(-1, keepdim=True)
    each = (logits * directions).sum(-1)
    counted = samples.counted
    return each.sum() if counted is None else each[counted.to(each.device)].sum()


@torch.no_grad()
def _half_square(passed: Passed, scheme: Scheme, scale: Tensor | None) -> float:
    """Half of the sum over tokens of the squared change that rounding in ``scheme`` causes.

    ``scale``: of static inputs.
    """
    rounded = dequantize(round_to_nearest(passed.weight, scheme.weights))
    if scheme.activations is None:
        error = passed.x @ (rounded - passed.weight).mT  # [tokens, out]
    else:
        x = fake_quantize_activations(passed.x, scheme.activations, scale)
        error = x @ rounded.mT - passed.x @ passed.weight.mT
    return float((error * passed.gradient).sum(1).square().sum()) / 2


@torch.no_grad()
def divergence(
    passes: FloatPasses,
    options: Mapping[Decision, Sequence[Scheme | None]],
    samples: Samples,
    batch_size: int,
    *,
    watch: Watch,
) -> dict[Decision, dict[Scheme | None, float]]:
    """The losses as measured, one decision and scheme at a time; weights are rounded to nearest."""
    losses = {d: dict.fromkeys(schemes, 0.0) for d, schemes in options.items()}
    batches = samples.batches(batch_size)
    scales = static_scales(passes, options, batches)
    together = max(1, _TOKENS_AT_ONCE // (samples.length * min(batch_size, len(samples))))
    done, total = 0, len(batches) * sum(len(each) for each in options.values())
    for batch in batches:
        expected = passes.logits(batch).log_softmax(-1)
        for number, block in enumerate(passes.blocks):
            weights = block.parameters_of()
            pairs = [
                (decision, scheme)
                for decision, schemes in options.items()
                if is_within(block.name, decision.linears[0])
                for scheme in schemes
                if scheme is not None
            ]
            for start in range(0, len(pairs), together):
                part = pairs[start : start + together]
                variants = [_variant(d, scheme, block.name, weights, scales) for d, scheme in part]
                logits = passes.logits_with(batch, number, variants)
                for (decision, scheme), own in zip(part, logits.chunk(len(part)), strict=True):
                    losses[decision][scheme] += _kl(expected, own, batch)
                done += len(part)
                watch(done, total)
    tokens = max(1, samples.count)
    return {d: {s: loss / tokens for s, loss in each.items()} for d, each in losses.items()}


def _variant(
    decision: Decision,
    scheme: Scheme,
    block: str,
    weights: Mapping[str, Tensor],
    scales: StaticScales,
) -> Variant:
    rounded = {
        name: dequantize(
            round_to_nearest(weights[f"{relative_name(block, name)}.weight"], scheme.weights)
        )
        for name in decision.linears
    }
    inputs = scheme.activations
    if inputs is None:
        return Variant(rounded)
    how = {n: InputRounding(inputs, scale_for(scales, n, inputs)) for n in decision.linears}
    return Variant(rounded, how)


def _kl(expected: Tensor, logits: Tensor, samples: Samples) -> float:
    """The divergence from ``expected`` log-probabilities, summed over counted tokens."""
    each = kl_div(logits.log_softmax(-1), expected, reduction="none", log_target=True).sum(-1)
    counted = samples.counted
    return float((each if counted is None else each[counted.to(each.device)]).sum())
