"""What two models predict for the same tokens, and how far apart their predictions are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import cross_entropy, kl_div

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

#: Tokens compared at a time: their probabilities are as wide as the vocabulary.
_CHUNK = 256


def logits_of(model: PreTrainedModel, tokens: Tensor, real: Tensor) -> Tensor:
    """The float32 logits of all ``real`` tokens, ``[tokens, vocabulary]``, on the CPU.

    ``tokens``: int64 ``[windows, length]``; ``real``: bool of the same shape.
    """
    logits: Tensor = model(input_ids=tokens.clamp(min=0).to(model.device), use_cache=False).logits
    return logits.float().cpu()[real]


def divergence(float_logits: Tensor, logits: Tensor) -> tuple[float, float]:
    """The mean KL divergence in nats, and the share of tokens with the same most likely token.

    Both arguments are ``[tokens, vocabulary]``.
    """
    total = 0.0
    for float_chunk, chunk in zip(float_logits.split(_CHUNK), logits.split(_CHUNK), strict=True):
        p, q = float_chunk.log_softmax(-1), chunk.log_softmax(-1)
        total += kl_div(q, p, reduction="sum", log_target=True).item()
    agreed = (float_logits.argmax(-1) == logits.argmax(-1)).double().mean().item()
    return total / len(float_logits), agreed


def mean_loss_of(logits: Tensor, tokens: Tensor) -> float:
    """The mean cross-entropy in nats with which ``logits`` predict each token but the first.

    ``logits``: ``[windows * length, vocabulary]``; ``tokens``: int64 ``[windows, length]``.
    """
    predicted = logits.unflatten(0, tokens.shape)[:, :-1].flatten(0, 1)
    targets = tokens[:, 1:].flatten()
    total = sum(
        cross_entropy(chunk, target, reduction="sum").item()
        for chunk, target in zip(predicted.split(_CHUNK), targets.split(_CHUNK), strict=True)
    )
    return total / len(targets)
