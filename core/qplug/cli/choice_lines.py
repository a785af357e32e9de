"""The lines about the schemes that ``--scheme auto`` chose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qplug.api.events import Choice


def choice_lines(choice: Choice, *, whole: bool) -> Iterator[str]:
    """Yields the schemes with their shares of the weights, and the loss that they are estimated at.

    With ``whole`` a table follows, with a line for each group of layers that has one scheme.
    """
    shares: Counter[str] = Counter()
    for group in choice.groups:
        shares[group.scheme] += group.weights
    total = sum(shares.values())
    parts = [f"{name} {count / total:.0%}" for name, count in shares.most_common()]
    yield f"chosen: {choice.bits:.3f} bits a weight: {', '.join(parts)}"
    by_bytes = "--max-kl" in choice.limits
    unit = " bytes" if by_bytes else ""
    reached = choice.bytes if by_bytes else choice.loss
    bound = f"{choice.bound:,.0f}" if by_bytes else f"{choice.bound:.5f}"
    gap = (reached - choice.bound) / reached if reached else 0.0
    yield (
        f"estimated divergence, rounded to nearest: {choice.loss:.5f} nats a token; no choice "
        f"within the budget is below {bound}{unit} (gap {gap:.2%})"
    )
    if not whole:
        return
    width = max(len(group.name) for group in choice.groups)
    column = max(len(group.scheme) for group in choice.groups)
    yield f"{'layers':<{width}}  {'scheme':<{column}}   bits  divergence"
    for group in choice.groups:
        names = f"{group.name:<{width}}  {group.scheme:<{column}}"
        yield f"{names}  {group.bits:5.2f}  {group.loss:.6f}"
