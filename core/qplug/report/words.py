"""Formats numbers and recipes for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qplug.reading.perplexity import Evaluation


def size(count: float) -> str:
    """Formats a number of bytes in decimal units: ``1.5 MB``."""
    if abs(count) >= 1e9:
        return f"{count / 1e9:,.2f} GB"
    if not count:
        return "0"
    return f"{count / 1e6:,.1f} MB" if abs(count) >= 1e6 else f"{count / 1e3:,.1f} kB"


def number(value: float | None) -> str:
    """Formats a number with four digits; None as a dash."""
    return "-" if value is None else f"{value:.4g}"


def bits(value: float | None) -> str:
    """Formats a number with three decimals, as ``qplug inspect`` does; None as a dash."""
    return "-" if value is None else f"{value:.3f}"


def span(low: float, high: float) -> str:
    """Formats the smallest and the largest of some values."""
    return f"{low:.4g} … {high:.4g}"


def text_of(result: Evaluation) -> str:
    """Describes the text that a perplexity was measured on."""
    return f"{result.windows} windows of {result.seq_len} tokens of {result.dataset}"


def recipe_rows(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns rows of name and value for a recipe (``Recipe.to_dict``), without empty values."""
    data = recipe["calibration"]
    rows = [
        ("algorithms", " + ".join(recipe["algorithms"])),
        ("options", _options(recipe["algorithm_options"])),
        ("scheme", recipe["scheme"]["name"]),
        ("weights", _args(recipe["scheme"]["weights"])),
        ("inputs", _args(recipe["scheme"]["activations"]) or "as they are"),
        ("other schemes", ", ".join(f"{p}: {s['name']}" for p, s in recipe["overrides"])),
        ("left float", ", ".join(recipe["ignore"])),
        ("KV cache", _args(recipe["kv_cache"])),
        ("backend", recipe["backend"]),
        ("backend options", _pairs(recipe["backend_options"])),
        ("calibration data", _data(data) if data else "none"),
        ("seed", str(recipe["seed"])),
    ]
    return [(name, value) for name, value in rows if value]


def _args(args: Mapping[str, Any] | None) -> str:
    if args is None:
        return ""
    strategies = {
        "tensor": "one scale",
        "channel": "a scale each row",
        "token": "a scale each token",
        "group": f"groups of {args['group_size']}",
        "block": " x ".join(map(str, ["blocks of", *(args["block"] or ())])).replace(" x ", " ", 1),
    }
    words = [args["dtype"], strategies[args["strategy"]]]
    words += [] if args["symmetric"] else ["asymmetric"]
    return ", ".join(words)


def _data(data: Mapping[str, Any]) -> str:
    options = f" ({_pairs(data['options'])})" if data["options"] else ""
    windows = f"{data['samples']} windows of {data['seq_len']} tokens of {data['dataset']}"
    return f"{windows}{options}, inputs from the {data['propagate']} blocks before"


def _options(options: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(
        f"{name}.{key}={value}" for name, pairs in options.items() for key, value in pairs.items()
    )


def _pairs(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items())
