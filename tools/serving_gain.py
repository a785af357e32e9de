"""Write what schemes buy, as benchmarks/serving.py found it, into the page on choosing one.

    python tools/serving_gain.py

Reads docs/serving_gain.json; writes docs/serving_gain.svg and the table between the page's marks.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from qplug.report.charts import Bar, rows

DOCS = Path(__file__).parents[1] / "docs"
FOUND, PICTURE = DOCS / "serving_gain.json", DOCS / "serving_gain.svg"
PAGE = DOCS / "how-to/choose-a-scheme.md"
BEGIN, END = "<!-- begin: serving gain -->", "<!-- end: serving gain -->"

#: What was timed, by its name in the results.
TIMED = {
    "decode 1": "one request",
    "decode 32": "32 requests",
    "prefill 8 x 2048": "reading prompts",
}

#: The width of the picture, in pixels.
_WIDTH = 760

_STYLE = """<style>
text { fill: #5b6570; font: 12px system-ui, sans-serif } .grid { stroke: #dcdfe3 }
.c0 { fill: #7d8792 } .c1 { fill: #c4500c } .c2 { fill: #1a7f4b } .c3 { fill: #1f6feb }
@media (prefers-color-scheme: dark) {
text { fill: #a3adb8 } .grid { stroke: #353b42 }
.c0 { fill: #8b949e } .c1 { fill: #ff9a5c } .c2 { fill: #5fd39a } .c3 { fill: #6cb0ff }
}</style>"""


def picture(found: dict[str, dict[str, Any]]) -> str:
    """Bars: how many times as fast as bf16 each scheme is, for each thing that was timed."""
    bars = {}
    for key, name in TIMED.items():
        for number, (scheme, row) in enumerate(found.items()):
            gain = row[key] / found["bf16"][key]
            told = f"{scheme}, {name}: {row[key]:,.0f} tokens a second, {gain:.2f} times bf16"
            bars[f"{name}: {scheme}"] = [[Bar(number, 0.0, gain, told)]]
    title = "How many times as fast as bf16 each scheme is served"
    drawn = rows(title, bars, legend=(), format_=lambda gain: f"{gain:g} x")
    return standalone(drawn)


def standalone(drawn: str) -> str:
    """A chart of a report as a file of its own, with the colours for light and for dark."""
    chart = re.search(r"<svg .*</svg>", drawn, re.DOTALL)
    assert chart is not None
    # A page stretches charts to its own width; a file has one.
    size = rf'viewBox="0 0 {_WIDTH} \1" width="{_WIDTH}" height="\1"'
    svg = re.sub(r'width="100%" height="(\d+)"', size, chart[0], count=1)
    svg = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return svg.replace(">", f">{_STYLE}", 1).replace("><", ">\n<") + "\n"


def table(found: dict[str, dict[str, Any]]) -> str:
    """Tokens a second, and times bf16."""
    lines = [f"| tokens a second | {' | '.join(TIMED.values())} |", f"|---|{'---|' * len(TIMED)}"]
    for scheme, row in found.items():
        cells = [f"{row[key]:,.0f} ({row[key] / found['bf16'][key]:.2f} x)" for key in TIMED]
        lines.append(f"| `{scheme}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def section(told: dict[str, Any]) -> str:
    """All that stands between the marks."""
    found = served(told)
    first = found["bf16"]
    graphs = "decoding in CUDA graphs" if "compilation_config" in first["options"] else "eager"
    head = (
        f"vLLM {first['versions']['vllm']} on an {first['device']}, {told['date']}, {graphs}, no "
        f"compilation: random weights of the shape of Llama 3 8B, quantized with `rtn`. A request "
        f"is 32 tokens long and writes 128; prompts are read 8 at a time, each of 2048 tokens "
        f"(`python benchmarks/serving.py`)."
    )
    image = "![How many times as fast as bf16 each scheme is served](../serving_gain.svg)"
    return "\n\n".join([BEGIN, head, image, table(found), END])


def served(told: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was timed, by scheme, the float model first."""
    found = {name: row for name, row in sorted(told["rows"].items()) if "error" not in row}
    return {"bf16": found["bf16"], **found}


def page(before: str, told: dict[str, Any]) -> str:
    """The page with this section in the place of what stood there."""
    head, _, rest = before.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return head + section(told) + tail


if __name__ == "__main__":
    told = json.loads(FOUND.read_text("utf-8"))
    PICTURE.write_text(picture(served(told)), "utf-8")
    PAGE.write_text(page(PAGE.read_text("utf-8"), told), "utf-8")
