"""The quality that perplexities show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qplug.output.measured import Measured
from qplug.report.words import text_of

if TYPE_CHECKING:
    from qplug.reading.perplexity import Evaluation


def measured_perplexity(measured: Mapping[str, Sequence[Evaluation]]) -> Measured | None:
    """Returns the quality that perplexities by model show; None without the quantized model.

    The keys of ``measured`` are ``float`` and ``quantized``.
    """
    if not measured.get("quantized"):
        return None
    evaluation = measured["quantized"][0]
    floats = {text_of(own): own.perplexity for own in measured.get("float", ())}
    text = text_of(evaluation)
    return Measured(text, evaluation.perplexity, floats.get(text))
