"""Measures how far a quantized folder is from its float model, and says it in a word."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from qplug.api.events import Quality
from qplug.checkpoint.config_file import CONFIG
from qplug.errors import QplugError
from qplug.machine.memory import naming_memory
from qplug.machine.session import Session
from qplug.model.foreign import naming_file
from qplug.reading.folder import open_folder
from qplug.reading.predictions import divergence, logits_of, mean_loss_of
from qplug.reading.streamed import stream_folder

if TYPE_CHECKING:
    from torch import Tensor

    from qplug.api.events import Verdict

#: The largest mean KL divergence, in nats a token, and the largest perplexity as a multiple of the
#: float model's, of a model that is "good", and of one that is not "broken": benchmarks/RESULTS.md
#: has the runs that they are taken from.
GOOD_KL, GOOD_RATIO = 0.05, 1.05
BROKEN_KL, BROKEN_RATIO = 0.3, 1.3


def verdict_of(kl: float, ratio: float) -> Verdict:
    """How far a model is from its float model in a word.

    ``kl`` is the mean KL divergence in nats a token, ``ratio`` the perplexity divided by the float
    model's. NaN is "broken".
    """
    if kl <= GOOD_KL and ratio <= GOOD_RATIO:
        return "good"
    return "noticeable" if kl <= BROKEN_KL and ratio <= BROKEN_RATIO else "broken"


def measure_quality(
    folder: str, against: str, tokens: Tensor, dataset: str, session: Session
) -> Quality:
    """Measure the perplexities of ``folder`` and of its float model ``against``, and their KL.

    ``tokens``: int64 ``[windows, length]``, text of ``dataset``. Both models compute in float32,
    with weights only in the block that computes, and the logits of all tokens in memory twice.
    Raises QplugError if a model does not run, or predicts no tokens.
    """
    opened = open_folder(folder, session)
    source = open_folder(against, session, or_float=True)
    if source.view.head is None:
        raise QplugError("the model predicts no tokens")
    real = torch.ones_like(tokens, dtype=torch.bool)
    losses, logits = [], []
    with (
        torch.inference_mode(),
        naming_memory(lambda: f"{len(tokens)} windows of {tokens.shape[1]} tokens"),
        naming_file(opened.checkpoint.folder / CONFIG, "the model does not run"),
    ):
        for one in (source, opened):
            predicted = logits_of(stream_folder(one, session.device), tokens, real)
            losses.append(mean_loss_of(predicted, tokens))
            logits.append(predicted)
        kl, _ = divergence(*logits)
    float_perplexity, perplexity = map(_perplexity, losses)
    return Quality(
        perplexity,
        float_perplexity,
        kl,
        verdict_of(kl, perplexity / float_perplexity),
        windows=len(tokens),
        seq_len=tokens.shape[1],
        dataset=dataset,
    )


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < math.log(torch.finfo(torch.float64).max) else math.inf
