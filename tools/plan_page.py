"""Write the plans of a few published models into the page on choosing a scheme.

    PYTHONPATH=tests python tools/plan_page.py

The models are those of tests/published.py: config.json and the shapes of tensors, no weights.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from published import LLAMA_3_8B, LLAMA_3_70B, QWEN3_30B_A3B, Published

from qplug.planning.fleet import find_fleet
from qplug.planning.headers import open_headers
from qplug.planning.outline import Outline, find_outline
from qplug.planning.plan import Fit, Wish, make_plan
from qplug.registry.registry import Registry

PAGE = Path(__file__).parents[1] / "docs/how-to/choose-a-scheme.md"
BEGIN, END = "<!-- begin: plans -->", "<!-- end: plans -->"

#: The models and GPUs of the page, and the schemes of each that it shows.
SHOWN = (
    ("Llama 3 8B", LLAMA_3_8B, ("4090", "L40S")),
    ("Llama 3 70B", LLAMA_3_70B, ("H100", "H100x2", "B200")),
    ("Qwen3 30B A3B", QWEN3_30B_A3B, ("4090x2", "L40S", "H100")),
)
SCHEMES = ("W4A16", "W8A8", "FP8_DYNAMIC")


def tables() -> str:
    """A table for each model: what each scheme leaves room for on each GPU, and how fast it is."""
    registry = Registry.installed().only("exporter", "reader")
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, model, gpus) in enumerate(SHOWN):
            outline = _outline(model, Path(folder) / str(number), registry)
            parts.append(f"### {name}\n\n{_table(outline, gpus, registry)}")
    return "\n\n".join(parts)


def _outline(model: Published, folder: Path, registry: Registry) -> Outline:
    return find_outline(open_headers(str(model.write(folder)), registry.sources))


def _table(outline: Outline, gpus: tuple[str, ...], registry: Registry) -> str:
    heads = [f"{gpu}: requests | tokens/s" for gpu in gpus]
    lines = [f"| | weights | {' | '.join(heads)} |", f"|---|---|{'---|---|' * len(gpus)}"]
    plans = [make_plan(outline, find_fleet(gpu), Wish(), registry, "vllm") for gpu in gpus]
    for scheme in ("", *SCHEMES):
        fits: list[Fit | None] = []
        for plan in plans:
            offers = [plan.float_model, *plan.fits]
            fits.append(next((fit for fit in offers if fit.offer.scheme == scheme), None))
        weights = next(fit.offer.nbytes for fit in fits if fit is not None)
        cells = " | ".join(map(_cell, fits))
        lines.append(f"| `{scheme or 'bf16'}` | {weights / 1e9:.1f} GB | {cells} |")
    cache = plans[0].cache
    lines.append("")
    lines.append(
        f"KV cache: {cache.nbytes(1):,} bytes a token, {cache.nbytes(8192) / 1e9:.1f} GB for a "
        "request of 8192 tokens."
    )
    return "\n".join(lines)


def _cell(fit: Fit | None) -> str:
    if fit is None:
        return "not served | "
    if not fit.requests:
        return "no room | "
    return f"{fit.requests} | {fit.one:.0f}" if fit.one else f"{fit.requests} | "


def page(text: str) -> str:
    """``text`` with the tables as they are now between the two marks."""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
