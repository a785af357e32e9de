"""The calibration tokens of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.utils.rnn import pad_sequence

from qplug.api import ModelView
from qplug.errors import QplugError
from qplug.machine.session import Session
from qplug.model.tokenizer import load_tokenizer
from qplug.recipe.recipe import Calibration
from qplug.text.windows import sample

if TYPE_CHECKING:
    from torch import Tensor


def calibration_tokens(
    calibration: Calibration, model: str, view: ModelView, session: Session, *, seed: int
) -> Tensor:
    """int64 ``[samples, length]``, the same for the same seed; -1 where a sample has ended.

    Raises QplugError if the dataset or its options are wrong, or the windows too long.
    """
    limit = view.config.get("max_position_embeddings")
    if isinstance(limit, int) and calibration.seq_len > limit:
        raise QplugError(f"--seq-len {calibration.seq_len}: the model takes {limit} at most")
    dataset = session.registry.datasets.make(calibration.dataset, calibration.options)
    tokenizer = load_tokenizer(model, trust_remote_code=session.trust_remote_code)
    samples = sample(
        dataset,
        tokenizer,
        calibration.sampling,
        length=calibration.seq_len,
        count=calibration.samples,
        seed=seed,
    )
    tokens = pad_sequence(list(samples), batch_first=True, padding_value=-1)
    vocabulary = view.config.get("vocab_size")
    if isinstance(vocabulary, int) and int(tokens.max()) >= vocabulary:
        raise QplugError(f"{model}: its tokenizer makes tokens that the model does not have")
    return tokens
