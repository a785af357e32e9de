"""The calibration samples of a run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from qplug.api import ModelView
from qplug.calibration.samples import Samples
from qplug.errors import QplugError
from qplug.machine.session import Session
from qplug.model.foreign import naming_file
from qplug.model.processor import load_processor
from qplug.model.tokenizer import load_tokenizer
from qplug.recipe.recipe import Calibration
from qplug.text.conversations import Renderer, Sample
from qplug.text.drawing import draw

#: The most tokens of a run: 2 GiB of numbers, and a thousand times what algorithms ask for.
_MOST_TOKENS = 1 << 28


def calibration_tokens(
    calibration: Calibration, model: str, view: ModelView, session: Session, *, seed: int
) -> Samples:
    """The calibration samples: windows of one dataset, or of several in a random order.

    The same seed gives the same samples. Raises QplugError if a dataset or its options are wrong,
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
    shares = [
        (session.registry.datasets.make(share.dataset, share.options), share.count)
        for share in calibration.shares
    ]
    tokenizer = load_tokenizer(model, trust_remote_code=session.trust_remote_code)

    @cache
    def processor() -> Any:
        return load_processor(model, trust_remote_code=session.trust_remote_code)

    render = Renderer(tokenizer, calibration.mask == "prompts", processor)
    drawn: list[list[Sample]] = []
    for dataset, count in shares:
        with (
            session.registry.blaming(dataset, "calibration text"),
            naming_file(Path(model) / "tokenizer.json", "its tokenizer does not work"),
        ):
            drawn.append(
                draw(
                    dataset,
                    render,
                    calibration.sampling,
                    length=calibration.seq_len,
                    count=count,
                    seed=seed,
                )
            )
    samples = Samples.of(_interleaved(drawn, seed))
    vocabulary = view.config.get("vocab_size")
    if isinstance(vocabulary, int) and (largest := int(samples.tokens.max())) >= vocabulary:
        raise QplugError(
            f"{model}: its tokenizer makes token {largest}, which the model does not "
            f"have: its vocabulary has {vocabulary}"
        )
    return samples


def _interleaved(drawn: Sequence[Sequence[Sample]], seed: int) -> list[Sample]:
    """The samples of all datasets in a random order; those of each dataset keep their order."""
    if len(drawn) == 1:
        return list(drawn[0])
    order = [number for number, samples in enumerate(drawn) for _ in samples]
    random.Random(seed).shuffle(order)  # noqa: S311 - must be reproducible, not secret
    following = [iter(samples) for samples in drawn]
    return [next(following[number]) for number in order]
