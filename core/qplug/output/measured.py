"""The quality of a quantized model, as pages and model cards show it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qplug.api.events import Quality

#: The class of a page's box, by verdict.
_TONES = {"good": "good", "noticeable": "fair", "broken": "bad"}


#: What a verdict means, in a sentence.
_REASONS = {
    "good": "The model predicts text as the float model does, but for little.",
    "noticeable": "The model predicts text worse than the float model: try it on your own tasks.",
    "broken": "The model predicts text much worse than the float model: do not serve it.",
}


@dataclass(frozen=True)
class Measured:
    """What was measured on ``text``, such as "16 windows of 512 tokens of demo".

    ``perplexity`` is the one of the quantized model; ``float_perplexity`` and ``kl``, the mean
    divergence of its predictions from those of the float model in nats for a token, are None if the
    float model was not measured. ``verdict`` is a word such as "good", "" without one, and
    ``reason`` a sentence that explains it.
    """

    text: str
    perplexity: float | None = None
    float_perplexity: float | None = None
    kl: float | None = None
    verdict: str = ""
    reason: str = ""

    @classmethod
    def of(cls, quality: Quality) -> Measured:
        """Returns a quality that a run, or ``qplug report --check``, has measured."""
        text = f"{quality.windows} windows of {quality.seq_len} tokens of {quality.dataset}"
        numbers = (quality.perplexity, quality.float_perplexity, quality.kl)
        return cls(text, *numbers, quality.verdict, _REASONS[quality.verdict])

    @property
    def tone(self) -> str:
        """The class of the page's box: ``good``, ``fair`` or ``bad``; "" without a verdict."""
        return _TONES.get(self.verdict, "fair") if self.verdict else ""

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
            sentence = f"Perplexity {self.perplexity:.4f}"
            if self.change is not None:
                base = f"{self.float_perplexity:.4f} of the float model"
                sentence += f", {self.change:+.2%} against {base}"
            told.append(f"{sentence}.")
        if self.kl is not None:
            told.append(f"Divergence from the float model {self.kl:.4f} nats for a token.")
        return told
