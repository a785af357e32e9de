"""Write the tables of capabilities into docs/engines.md: ``python tools/capabilities.py``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from qplug import PRESETS, Capability
from qplug.api.gpus import DEVICES
from qplug.registry.registry import Registry
from qplug_compressed_tensors.engine import CompressedTensorsLoader
from qplug_compressed_tensors.loader import Loader

PAGE = Path(__file__).parents[1] / "docs/engines.md"
#: What a plain entry of ``ignore`` matches.
_PLAIN = {"whole": "whole names", "end": "ends of names", "part": "parts of names"}


def tables() -> str:
    """A part for each backend that has an engine, with a table for each release."""
    registry = Registry.installed()
    parts = []
    for name in registry.exporters:
        engine = registry.exporters[name].engine
        if engine is not None and engine.releases:
            parts.append(f"### `{name}`")
            parts += [f"{head}\n\n{_table(rows)}" for head, rows in engine.releases.items()]
    return "\n\n".join(parts)


def loaders() -> str:
    """A table of what the loaders of compressed-tensors folders read, by release."""
    registry = Registry.installed()
    lines = [
        "| loader | formats in a folder | head | embedding | scales of a cache "
        "| entries of `ignore` match |",
        "|---|---|---|---|---|---|",
    ]
    for name in registry.exporters:
        engine = registry.exporters[name].engine
        held = engine.loaders if isinstance(engine, CompressedTensorsLoader) else {}
        for release, loader in held.items():
            cells = [
                *(_formats(loader), _list(loader.heads), _embeddings(loader)),
                *(_caches(loader), _PLAIN[loader.plain]),
            ]
            lines.append(f"| {release} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _formats(loader: Loader) -> str:
    if not loader.own_formats:
        return "one"
    alone = _list(loader.one_format_for_experts)
    return f"any; beside experts in {alone} one" if loader.one_format_for_experts else "any"


def _list(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names)) or "no"


def _embeddings(loader: Loader) -> str:
    return f"of {len(loader.embeddings)} architectures" if loader.embeddings else "no"


def _caches(loader: Loader) -> str:
    if loader.caches and loader.cache_models is not None:
        return f"for {len(loader.cache_models)} architectures"
    by_head = ", also by head" if "attn_head" in loader.caches else ""
    return f"yes{by_head}" if loader.caches else "no"


def _table(rows: Sequence[Capability]) -> str:
    lines = [
        f"| scheme | {' | '.join(DEVICES)} | groups | out, in % |",
        f"|---|{'---|' * len(DEVICES)}---|---|",
    ]
    reasons: list[str] = []
    seen = dict.fromkeys(row.scheme for row in rows)
    for scheme in sorted(seen, key=list(PRESETS).index):
        alike = [row for row in rows if row.scheme == scheme]
        cells = [_cell([row for row in alike if gpu in row.devices], reasons) for gpu in DEVICES]
        served = [row for row in alike if row.served]
        sizes = ", ".join(map(str, served[0].group_sizes)) if served else ""
        limits = dict.fromkeys(f"{row.out_multiple}, {row.in_multiple}" for row in served)
        lines.append(f"| `{scheme}` | {' | '.join(cells)} | {sizes} | {'; '.join(limits)} |")
    notes = "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))
    return "\n".join(lines) + (f"\n\n{notes}" if notes else "")


def _cell(rows: Sequence[Capability], reasons: list[str]) -> str:
    if not rows:
        return ""
    (row,) = rows
    if row.served:
        return f"**{row.kernel}**" if row.evidence.startswith("run") else row.kernel
    if row.kernel not in reasons:
        reasons.append(row.kernel)
    return f"no ({reasons.index(row.kernel) + 1})"


def page(text: str) -> str:
    """``text`` with the tables as they are now between the marks."""
    for mark, made in (("capabilities", tables()), ("loaders", loaders())):
        begin, end = f"<!-- {mark}: written by tools/capabilities.py -->", f"<!-- /{mark} -->"
        before, _, rest = text.partition(begin)
        after = rest.partition(end)[2]
        text = f"{before}{begin}\n\n{made}\n\n{end}{after}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
