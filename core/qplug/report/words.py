"""Numbers and recipes in the words of a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qplug.reading.perplexity import Evaluation


def size(count: float) -> str:
    """Bytes, in decimal units."""
    if abs(count) >= 1e9:
        return f"{count / 1e9:,.2f} GB"
    if not count:
        return "0"
    return f"{count / 1e6:,.1f} MB" if abs(count) >= 1e6 else f"{count / 1e3:,.1f} kB"


def number(value: float | None) -> str:
    """Four digits; a dash for None."""
    return "-" if value is None else f"{value:.4g}"


def bits(value: float | None) -> str:
    """Three digits behind the point, as ``qplug inspect`` has them."""
    return "-" if value is None else f"{value:.3f}"


def span(low: float, high: float) -> str:
    return f"{low:.4g} … {high:.4g}"


def text_of(found: Evaluation) -> str:
    """The text that a perplexity was measured on."""
    return f"{found.windows} windows of {found.seq_len} tokens of {found.dataset}"


def recipe_rows(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a recipe (``Recipe.to_dict``) says, a row each; nothing of what it leaves alone."""
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
    return [(name, told) for name, told in rows if told]


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
    told = [args["dtype"], strategies[args["strategy"]]]
    told += [] if args["symmetric"] else ["asymmetric"]
    return ", ".join(told)


def _data(data: Mapping[str, Any]) -> str:
    options = _pairs(data["options"])
    told = f"{data['samples']} windows of {data['seq_len']} tokens of {data['dataset']}"
    return f"{told} ({options}), {_fed(data)}" if options else f"{told}, {_fed(data)}"


def _fed(data: Mapping[str, Any]) -> str:
    return f"blocks fed by {data['propagate']} ones"


def _options(options: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(
        f"{name}.{key}={value}" for name, own in options.items() for key, value in own.items()
    )


def _pairs(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items())
