"""Gram matrices of experts, completed by what else is known of their inputs.

The Gram matrix of ``n`` tokens of ``in`` channels, divided by ``n``, is off by about ``sqrt(in /
n)`` (Marchenko and Pastur, 1967): GPTQ then moves errors along correlations that other tokens do
not have. A matrix that is known better is added, with a weight of that size. Estimates of
covariances are shrunk in the same way (Ledoit and Wolf, 2004; Schäfer and Strimmer, 2005).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qplug.api import InputGroup
from qplug.numerics.alike import together

#: The parts of the layer's Gram matrix, and of its diagonal, in the matrix that is added.
_OF_LAYER, _OF_DIAGONAL = 0.75, 0.25
#: The part of an expert's own diagonal where the layer says nothing. It weakens correlations that
#: are real, too, so that it is smaller.
_OF_OWN_DIAGONAL = 0.5
#: The tokens that pull an expert's own diagonal to its mean.
_EVEN = 16


def completed_grams(grams: Tensor, tokens: Tensor, layer: Tensor | None, prior: float) -> Tensor:
    """The Gram matrices ``G + prior * sqrt(in * n) * P`` of experts, float32 ``[experts, in, in]``.

    ``grams``, of the same shape, are the sums ``G`` of ``xᵀx`` over the tokens of each expert, and
    ``tokens``, ``[experts]``, their numbers ``n``, of which 0 counts as 1. ``layer: [in, in]``: the
    mean of ``xᵀx`` over all tokens of the layer; ``P`` is three quarters of it and one quarter of
    its diagonal. Without it ``P`` is half the diagonal of ``G / n``, pulled to its mean as by 16
    tokens more, or half the identity if ``G`` is zero. If ``layer`` is given and channels are
    scaled by ``S``, then results are ``SGS``.
    """
    counts = tokens.to(grams.dtype).clamp(min=1)
    weights = prior * (grams.shape[-1] * counts).sqrt()  # as many tokens are added
    completed = grams.clone()
    diagonals = completed.diagonal(dim1=-2, dim2=-1)  # [experts, in]
    if layer is not None:
        completed += (_OF_LAYER * weights)[:, None, None] * layer
        diagonals += (_OF_DIAGONAL * weights)[:, None] * layer.diagonal()
        return completed
    own = diagonals / counts[:, None]
    mean = own.mean(1, keepdim=True)
    mean = torch.where(mean > 0, mean, 1)
    even = (own * tokens[:, None] + mean * _EVEN) / (tokens[:, None] + _EVEN)
    diagonals += (_OF_OWN_DIAGONAL * weights)[:, None] * even
    return completed


def completed_gram(parts: Sequence[InputGroup], whole: InputGroup, prior: float) -> Tensor:
    """The Gram matrices to compute with for ``parts``, which are alike: ``[n, in, in]``.

    They are some of ``whole.by_tokens``, or groups of experts of the same layer as ``whole``.
    ``completed_grams`` completes those of experts: by the tokens of the layer, if the expert reads
    some of these. The last linear of an expert reads channels that no other linear has. All other
    groups keep their Gram matrix, and so do experts with a ``prior`` of 0.
    """
    grams = together([part.gram for part in parts])
    if not prior or not _is_expert(parts[0], whole):
        return grams
    tokens = torch.tensor([part.tokens for part in parts], device=grams.device)
    layer = None if whole.experts else whole.gram / max(1, whole.tokens)
    return completed_grams(grams, tokens, layer, prior)


def completed_experts(groups: Sequence[InputGroup]) -> Iterator[str]:
    """Yields a note for each layer with experts whose tokens are fewer than their channels.

    Experts of more tokens have most of their Gram matrix from these.
    """
    few: dict[str, dict[str, None]] = {}  # numbers of experts by layer, each once
    for whole in groups:
        for part in whole.by_tokens:
            if _is_expert(part, whole) and part.tokens < part.width:
                layer, number, _ = part.linears[0].name.rsplit(".", 2)
                few.setdefault(layer, {})[number] = None
    for layer, numbers in few.items():
        yield (
            f"{layer}: fewer tokens than channels reached {', '.join(numbers)}; statistics of the "
            "layer complete theirs"
        )


def _is_expert(part: InputGroup, whole: InputGroup) -> bool:
    """Whether ``part``, one of ``whole.by_tokens``, has the linears of one expert."""
    return whole.experts is not None or any(part is own for own in whole.by_expert)
