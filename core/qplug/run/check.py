"""Checks the result of a run against its float model, on text that calibration has not seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qplug.api import Dataset, ModelView
from qplug.api.events import Quality, Result, RunPlan
from qplug.calibration.samples import Samples
from qplug.errors import QplugError
from qplug.machine.memory import free_memory, gibibytes
from qplug.machine.session import Session
from qplug.model.foreign import naming_file
from qplug.model.tokenizer import load_tokenizer
from qplug.reading.quality import measure_quality
from qplug.recipe.recipe import Calibration
from qplug.run.costs import Machine
from qplug.text.windows import first_windows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Windows, and tokens of each.
_WINDOWS, _LENGTH = 8, 256
#: The most numbers in the logits of all tokens: 1 GiB in float32.
_MOST_LOGITS = 1 << 28
#: Windows are looked for among this many times as many.
_CANDIDATES = 16
#: Tokens in a row that a held-back window may not share with calibration: it finds each run of
#: twice as many.
_SHARED = 32
#: The check takes at most this share of the time of the run, or these seconds.
_SHARE, _SECONDS = 0.1, 60.0
#: The text if there is no other.
_DEFAULT = "demo"


def check_quality(
    result: Result,
    plan: RunPlan,
    view: ModelView,
    data: Calibration | None,
    samples: Samples | None,
    session: Session,
) -> Quality:
    """Measure the quality of ``result``, the finished run ``plan``.

    ``view`` is the source's; ``data`` and ``samples`` are those of calibration, None without data.
    The text is the evaluation text of the dataset that calibration read, or of ``demo``. Raises
    QplugError if there is nothing to measure, or if it would take too long or too much memory.
    """
    if view.head is None:
        raise QplugError("the model predicts no tokens")
    if session.processes.count > 1:
        raise QplugError("several processes share the run")
    count = min(_WINDOWS, _MOST_LOGITS // (_vocabulary(view) * _LENGTH))
    if not count:
        raise QplugError("the vocabulary is too large")
    _refuse_long(result, plan, view, count * _LENGTH, session)
    tokens, dataset = _held_back(plan.model, view, data, samples, count, session)
    return measure_quality(str(result.out), plan.model, tokens, dataset, session)


def _vocabulary(view: ModelView) -> int:
    if view.head is not None and view.head in view.linears:
        return view.linears[view.head][0]
    size = view.config.get("vocab_size")
    return size if isinstance(size, int) and size > 0 else 1 << 18


def _refuse_long(
    result: Result, plan: RunPlan, view: ModelView, tokens: int, session: Session
) -> None:
    """Raises QplugError if the check would take too long, or more memory than is free."""
    rates = Machine.of(session).rates
    seconds = 2 * 2 * tokens * plan.parameters / rates.forward
    seconds += (plan.source_bytes + plan.bytes) / rates.read
    if seconds > max(_SECONDS, _SHARE * result.seconds):
        raise QplugError(f"it would take about {seconds / 60:.1f} minutes")
    if any(".experts." in name for name in view.linears):  # then a model may be loaded whole
        needed = 4 * plan.parameters
        free = free_memory(session.device)
        if free is not None and needed > free:
            raise QplugError(f"it would take up to {gibibytes(needed)} of memory")


def _held_back(
    model: str,
    view: ModelView,
    data: Calibration | None,
    samples: Samples | None,
    count: int,
    session: Session,
) -> tuple[Tensor, str]:
    """Returns up to ``count`` windows, int64 ``[windows, length]``, and the name of the dataset."""
    limit = view.config.get("max_position_embeddings")
    length = min(_LENGTH, limit) if isinstance(limit, int) else _LENGTH
    seen = shared_runs(samples)
    texts: list[tuple[str, Mapping[str, Any]]] = [(_DEFAULT, {})]
    if data is not None:
        texts = [(share.dataset, share.options) for share in data.shares] + texts
    why = QplugError("there is no text")
    for name, options in texts:
        dataset = session.registry.datasets.make(name, options)
        try:
            found = _windows(dataset, model, length, _CANDIDATES * count, session)
        except QplugError as error:
            why = error  # such as a text that is shorter than a window
            continue
        kept = found[[not seen(window) for window in found]][:count]
        if len(kept):
            return kept, name
        why = QplugError(f"calibration has used all of the text of {name}")
    raise why


def _windows(
    dataset: Dataset[Any], model: str, length: int, count: int, session: Session
) -> Tensor:
    tokenizer = load_tokenizer(model, trust_remote_code=session.trust_remote_code)
    with (
        session.registry.blaming(dataset, "text for evaluation"),
        naming_file(Path(model) / "tokenizer.json", "its tokenizer does not work"),
    ):
        return first_windows(dataset, tokenizer, length=length, count=count, split="evaluation")


def shared_runs(samples: Samples | None) -> Callable[[torch.Tensor], bool]:
    """Returns a function that says whether a window, int64 ``[length]``, is in ``samples``.

    It is if ``2 * _SHARED`` tokens in a row are, at the latest.
    """
    if samples is None:
        return lambda window: False
    runs = {
        tuple(run)
        for row in samples.tokens.tolist()
        for run in (row[at : at + _SHARED] for at in range(0, len(row), _SHARED))
        if len(run) == _SHARED and min(run) >= 0
    }

    def is_seen(window: torch.Tensor) -> bool:
        tokens = window.tolist()
        return any(tuple(tokens[at : at + _SHARED]) in runs for at in range(len(tokens)))

    return is_seen
