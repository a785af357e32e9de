"""Perplexity: how surprised a model is by a text."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qplug.checkpoint.locate import find_model
from qplug.checkpoint.open import read_json
from qplug.errors import QplugError
from qplug.machine.session import Session
from qplug.model.tokenizer import load_tokenizer
from qplug.reading.folder import open_folder
from qplug.reading.load import load_folder
from qplug.registry.registry import Registry
from qplug.text.windows import first_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Tokens that one forward pass takes: logits are as wide as the vocabulary, in float32.
_TOKENS = 2048


@dataclass(frozen=True)
class Evaluation:
    """The perplexity of a model, and on what."""

    model: str
    perplexity: float
    dataset: str
    windows: int
    seq_len: int


def evaluate(
    model: str,
    *,
    dataset: str = "demo",
    dataset_options: Mapping[str, Any] | None = None,
    seq_len: int = 512,
    windows: int | None = 64,
    device: str = "auto",
    trust_remote_code: bool = False,
    registry: Registry | None = None,
    watch: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity over the first ``windows`` windows of ``seq_len`` tokens of a text, or all.

    The text is tokenised once, without special tokens, and cut into windows that do not overlap;
    each token but the first of a window is predicted, in float32. Codes are dequantized, and
    activations rounded as the scheme says. Raises QplugError for what the user can mend.
    """
    session = Session.alone(device, registry=registry, trust_remote_code=trust_remote_code)
    tokens = evaluation_tokens(
        model,
        session,
        dataset=dataset,
        dataset_options=dataset_options,
        seq_len=seq_len,
        windows=windows,
    )
    net = load_folder(open_folder(model, session))
    net.to(session.device)  # type: ignore[arg-type]
    loss = mean_loss(net, tokens, watch or (lambda *_: None))
    return Evaluation(model, math.exp(loss), dataset, len(tokens), seq_len)


def evaluation_tokens(
    model: str,
    session: Session,
    *,
    dataset: str,
    dataset_options: Mapping[str, Any] | None,
    seq_len: int,
    windows: int | None,
) -> Tensor:
    """What ``evaluate`` reads, int64 ``[windows, seq_len]``. Raises QplugError as it does."""
    source = session.registry.datasets.make(dataset, dataset_options)
    limit = read_json(find_model(model) / "config.json").get("max_position_embeddings")
    if isinstance(limit, int) and seq_len > limit:
        raise QplugError(f"--seq-len {seq_len}: the model takes {limit} tokens at most")
    tokenizer = load_tokenizer(model, trust_remote_code=session.trust_remote_code)
    count = sys.maxsize if windows is None else windows
    return first_windows(source, tokenizer, length=seq_len, count=count, split="evaluation")


@torch.inference_mode()
def mean_loss(model: PreTrainedModel, tokens: Tensor, watch: Callable[[int, int], None]) -> float:
    """Mean cross-entropy in nats over ``tokens: [windows, length]``, each window on its own."""
    total, count = 0.0, 0
    done = 0
    for batch in tokens.split(max(1, _TOKENS // tokens.shape[1])):
        batch = batch.to(model.device)
        logits = model(input_ids=batch, use_cache=False).logits.float()  # [batch, length, vocab]
        targets = batch[:, 1:].flatten()
        total += cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum").item()
        count += targets.numel()
        done += len(batch)
        watch(done, len(tokens))
    return total / count
