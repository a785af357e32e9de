"""The quality of a quantized model, as its page and its model card show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qplug.report.words import text_of

if TYPE_CHECKING:
    from qplug.reading.perplexity import Evaluation


@dataclass(frozen=True)
class Quality:
    """What was measured on ``text``, such as "16 windows of 512 tokens of demo".

    ``perplexity`` is the one of the quantized model; ``float_perplexity`` and ``kl``, the mean
    divergence of its predictions from those of the float model in nats, are None if the float model
    was not measured. ``verdict`` is a word such as "good", "" without one, and ``reason`` a
    sentence that explains it.
    """

    text: str
    perplexity: float | None = None
    float_perplexity: float | None = None
    kl: float | None = None
    verdict: str = ""
    reason: str = ""

    @property
    def tone(self) -> str:
        """The class of the page's box: ``good``, ``fair`` or ``bad``; "" without a verdict."""
        tones = {"good": "good", "noticeable": "fair", "broken": "bad"}
        return tones.get(self.verdict, "fair") if self.verdict else ""

    @property
    def change(self) -> float | None:
        """The relative change of the perplexity against the float model: 0.05 is 5 % more."""
        if self.perplexity is None or not self.float_perplexity:
            return None
        return self.perplexity / self.float_perplexity - 1

    @property
    def sentences(self) -> list[str]:
        """What was measured, in words."""
        told = []
        if self.perplexity is not None:
            told.append(f"Perplexity {self.perplexity:.4f}")
            if self.change is not None:
                told[-1] += f", {self.change:+.2%} against {self.float_perplexity:.4f} of the float"
                told[-1] += " model"
        if self.kl is not None:
            told.append(f"Divergence from the float model {self.kl:.4f} nats for a token")
        return [f"{sentence}." for sentence in told]


def measured_quality(measured: Mapping[str, Sequence[Evaluation]]) -> Quality | None:
    """Returns the quality that perplexities by model show; None without the quantized model.

    The keys of ``measured`` are ``float`` and ``quantized``.
    """
    if not measured.get("quantized"):
        return None
    evaluation = measured["quantized"][0]
    floats = {text_of(own): own.perplexity for own in measured.get("float", ())}
    text = text_of(evaluation)
    return Quality(text, evaluation.perplexity, floats.get(text))
