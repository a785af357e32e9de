"""The calibration tokens of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch.nn.utils.rnn import pad_sequence

from qplug.api import ModelView
from qplug.errors import QplugError
from qplug.machine.session import Session
from qplug.model.foreign import naming_file
from qplug.model.tokenizer import load_tokenizer
from qplug.recipe.recipe import Calibration
from qplug.text.windows import sample

if TYPE_CHECKING:
    from torch import Tensor

#: The most tokens of a run: 2 GiB of numbers, and a thousand times what algorithms ask for.
_MOST_TOKENS = 1 << 28


def calibration_tokens(
    calibration: Calibration, model: str, view: ModelView, session: Session, *, seed: int
) -> Tensor:
    """Calibration tokens, int64 ``[samples, length]``, padded on the right with -1.

    The same seed gives the same tokens. Raises QplugError if the dataset or its options are wrong,
    or if the model does not take windows of that length or tokens of that number.
    """
    limit = view.config.get("max_position_embeddings")
    if isinstance(limit, int) and calibration.seq_len > limit:
        raise QplugError(f"--seq-len {calibration.seq_len}: the model takes {limit} tokens at most")
    if calibration.samples * calibration.seq_len > _MOST_TOKENS:
        raise QplugError(
            f"--samples {calibration.samples} x --seq-len {calibration.seq_len}: more than "
            f"{_MOST_TOKENS} tokens; ask for fewer or shorter samples"
        )
    dataset = session.registry.datasets.make(calibration.dataset, calibration.options)
    tokenizer = load_tokenizer(model, trust_remote_code=session.trust_remote_code)
    with (
        session.registry.blaming(dataset, "calibration text"),
        naming_file(Path(model) / "tokenizer.json", "its tokenizer does not work"),
    ):
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
        raise QplugError(
            f"{model}: its tokenizer makes token {int(tokens.max())}, which the model does not "
            f"have: its vocabulary has {vocabulary}"
        )
    return tokens
