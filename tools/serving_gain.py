"""Write what schemes buy, as benchmarks/serving.py found it, into the page and into the plan.

    PYTHONPATH=benchmarks python tools/serving_gain.py

Reads docs/serving_gain.json; writes a picture for each shape, the tables between the marks of the
page on choosing a scheme, and core/qplug/planning/speeds.py.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from llama_shapes import LLAMA_3_8B
from qwen3_moe_shapes import QWEN3_30B_A3B

from qplug.api.gpus import model_named
from qplug.report.charts import Bar, rows

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FOUND, PAGE = DOCS / "serving_gain.json", DOCS / "how-to/choose-a-scheme.md"
DATA = ROOT / "core/qplug/planning/speeds.py"
GAIN = ("<!-- begin: serving gain -->", "<!-- end: serving gain -->")
ADVICE = ("<!-- begin: advice -->", "<!-- end: advice -->")

Row = dict[str, Any]

#: The shapes by the name in a row: the tensors, how many layers the model has, and its picture.
SHAPES = {
    "Llama 3 8B": (LLAMA_3_8B, 32, "serving_gain.svg"),
    "Qwen3 30B A3B": (QWEN3_30B_A3B, 48, "serving_gain_experts.svg"),
}

#: The order of schemes; others follow by name.
ORDER = ("bf16", "W4A16", "FP8_DYNAMIC", "W8A8", "FP8_BLOCK", "NVFP4A16", "W4AFP8")

#: The algorithm that the page advises for a scheme.
ALGORITHMS = {
    "W4A16": "gptq",
    "FP8_DYNAMIC": "rtn",
    "W8A8": "smoothquant",
    "FP8_BLOCK": "rtn",
    "NVFP4A16": "gptq",
    "W4AFP8": "gptq",
}

#: The schemes that multiply in fp8, which Ampere cannot.
IN_FP8 = ("FP8_DYNAMIC", "FP8_BLOCK", "W4AFP8")

#: Schemes that come so near to the fastest count as fast; the first in ORDER is advised.
NEAR = 0.98

#: The mean number of tokens of a request while it is written: from 32 to 160.
WRITTEN = 96

#: The width of a picture, in pixels, and the height of its legend.
_WIDTH, _LEGEND = 760, 26

_STYLE = """<style>
text { fill: #5b6570; font: 12px system-ui, sans-serif } .grid { stroke: #dcdfe3 }
.c0 { fill: #1f6feb } .c1 { fill: #c4500c } .c2 { fill: #1a7f4b } .c3 { fill: #8250df }
.c4 { fill: #b3261e } .c5 { fill: #0b7285 } .c6 { fill: #7a5c00 } .c7 { fill: #6b7280 }
@media (prefers-color-scheme: dark) {
text { fill: #a3adb8 } .grid { stroke: #353b42 }
.c0 { fill: #6cb0ff } .c1 { fill: #ff9a5c } .c2 { fill: #5fd39a } .c3 { fill: #c7a6ff }
.c4 { fill: #ff8a80 } .c5 { fill: #5fd0e0 } .c6 { fill: #e3c15a } .c7 { fill: #aab2bd }
}</style>"""


class Group(dict[str, Row]):
    """The rows of one shape on one device by scheme, the float model first."""

    @property
    def first(self) -> Row:
        return self["bf16"]

    @property
    def timed(self) -> dict[str, str]:
        """What was timed, by its name in the rows: writing with few requests first."""
        found = {}
        for key in self.first:
            if match := re.fullmatch(r"decode (\d+)", key):
                found[key] = f"writing, {_requests(int(match[1]))}"
        for key in self.first:
            if match := re.fullmatch(r"prefill (\d+) x (\d+)", key):
                found[key] = f"reading {match[1]} x {match[2]}"
        return found

    @property
    def rank(self) -> tuple[int, str]:
        return len(self), self.first["date"]

    def gain(self, scheme: str, key: str) -> float:
        """How many times as fast as bf16 a scheme is."""
        return float(self[scheme][key] / self.first[key])


def _requests(number: int) -> str:
    return "1 request" if number == 1 else f"{number} requests"


def groups(told: dict[str, Any]) -> dict[str, list[Group]]:
    """The groups of each shape; the one with the most schemes, of these the newest, comes first.

    A group needs the float model and a scheme beside it.
    """
    apart: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    for row in told["rows"]:
        if "error" not in row:
            apart[row["shape"], row["device"]][row["scheme"]] = row
    found: dict[str, list[Group]] = {name: [] for name in SHAPES}
    for (shape, _), each in apart.items():
        if "bf16" not in each or len(each) < 2:
            continue
        known = [scheme for scheme in ORDER if scheme in each]
        names = [*known, *sorted(set(each) - set(known))]
        found[shape].append(Group((name, each[name]) for name in names))
    return {
        shape: sorted(each, key=lambda group: group.rank, reverse=True)
        for shape, each in found.items()
        if each
    }


def picture(group: Group) -> str:
    """Bars: how many times as fast as bf16 each scheme is, for each thing that was timed."""
    schemes = [scheme for scheme in group if scheme != "bf16"]
    bars = {}
    for key, name in group.timed.items():
        bars[name] = [
            [Bar(number, 0.0, group.gain(scheme, key), _told(group, scheme, key))]
            for number, scheme in enumerate(schemes)
        ]
    drawn = rows(title(group), bars, legend=(), format_=lambda gain: f"{gain:g} x")
    return standalone(drawn, schemes)


def title(group: Group) -> str:
    return f"How many times as fast as bf16 each scheme is served: {group.first['shape']}"


def _told(group: Group, scheme: str, key: str) -> str:
    return f"{scheme}: {group[scheme][key]:,.0f} tokens a second, {group.gain(scheme, key):.2f} x"


def standalone(drawn: str, names: list[str]) -> str:
    """A chart of a report as a file of its own, with a legend and the colours for both themes."""
    chart = re.search(r"<svg .*</svg>", drawn, re.DOTALL)
    height = re.search(r'width="100%" height="(\d+)"', drawn)
    assert chart is not None
    assert height is not None
    # A page stretches charts to its own width; a file has one.
    high = int(height[1]) + _LEGEND
    size = f'viewBox="0 -{_LEGEND} {_WIDTH} {high}" width="{_WIDTH}" height="{high}"'
    svg = chart[0].replace(height[0], size, 1)
    svg = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    legend, x = "", 0
    for number, name in enumerate(names):
        legend += f'<rect x="{x}" y="-18" width="11" height="11" class="c{number}"/>'
        legend += f'<text x="{x + 16}" y="-8">{name}</text>'
        x += 36 + math.ceil(7.8 * len(name))
    return svg.replace(">", f">{_STYLE}{legend}", 1).replace("><", ">\n<") + "\n"


def table(group: Group) -> str:
    """Tokens a second, and times bf16."""
    timed = group.timed
    lines = [f"| tokens a second | {' | '.join(timed.values())} |", f"|---|{'---|' * len(timed)}"]
    for scheme, row in group.items():
        cells = [f"{row[key]:,.0f} ({group.gain(scheme, key):.2f} x)" for key in timed]
        lines.append(f"| `{scheme}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def section(told: dict[str, Any]) -> str:
    """All that stands between the marks."""
    parts = []
    for shape, each in groups(told).items():
        whole, file = SHAPES[shape][1:]
        for number, group in enumerate(each):
            if number == 0:
                parts += [f"### {shape}", _where(group, whole), f"![{title(group)}](../{file})"]
            else:
                parts.append(_where(group, whole))
            parts.append(table(group))
    for row in told["rows"]:
        if row["scheme"] == "bf16" and row["shape"] not in groups(told):
            group = Group({"bf16": row})
            where = _where(group, SHAPES[row["shape"]][1])
            parts += [f"### {row['shape']}", f"{where} No scheme was timed yet.", table(group)]
    return "\n\n".join(parts)


def _where(group: Group, whole: int) -> str:
    """The engine, the device, the day and the model, as a line above a table."""
    first = group.first
    layers = f", {first['layers']} of its {whole} layers" if first["layers"] != whole else ""
    return (
        f"vLLM {first['versions']['vllm']} on an {first['device']}, {first['date']}: random "
        f"weights of the shape of {first['shape']}{layers}."
    )


def data(told: dict[str, Any]) -> str:
    """The module of qplug's planning that has the speeds, as text."""
    lines = [
        '"""How fast schemes are served: written by tools/serving_gain.py, not by hand.',
        "",
        "The figures are those of docs/serving_gain.json.",
        '"""',
        "",
        "from __future__ import annotations",
        "",
        "from qplug.planning.timing import Speed, Timing",
        "",
        "TIMINGS = (",
    ]
    for shape, (group, *_) in groups(told).items():
        lines += _timing(shape, group)
    return "\n".join([*lines, ")", ""])


def _timing(shape: str, group: Group) -> list[str]:
    tensors, whole, _ = SHAPES[shape]
    first = group.first
    gpu = model_named(first["device"])
    assert gpu is not None, first["device"]
    number = dict.fromkeys(("dense", "experts"), 0)
    for name, sides in tensors.layer(0).items():
        if len(sides) == 2 and not name.endswith("mlp.gate.weight"):
            number["experts" if ".experts." in name else "dense"] += math.prod(sides)
    config = tensors.config(first["layers"])
    share = config.get("num_experts_per_tok", 0) / config.get("num_experts", 1)
    keys = config["num_key_value_heads"] * config["head_dim"]
    layers = first["layers"]
    part = f" ({layers} of its {whole} layers)" if layers != whole else ""
    version = ".".join(first["versions"]["vllm"].split(".")[:2])
    values = {
        "shape": json.dumps(f"{shape}{part}"),
        "gpu": json.dumps(gpu[0]),
        "engine": json.dumps(f"vLLM {version}"),
        "date": json.dumps(first["date"]),
        "blocks": f"{layers}",
        "dense": f"{number['dense'] * layers:_}",
        "experts": f"{number['experts'] * layers:_}",
        "head": f"{math.prod(tensors.outer()['lm_head.weight']):_}",
        "share": f"{share}",
        "cache": f"{2 * 2 * keys * layers:_}",
        "tokens": f"{WRITTEN}",
    }
    speeds = []
    for scheme, row in group.items():
        writing = {int(key.split()[1]): row[key] for key in group.timed if key.startswith("decode")}
        reading = [row[key] for key in group.timed if key.startswith("prefill")][-1]
        name = "" if scheme == "bf16" else scheme
        speeds.append(f'            "{name}": Speed({writing}, {reading}),')
    return [
        "    Timing(",
        *(f"        {name}={value}," for name, value in values.items()),
        "        speeds={",
        *speeds,
        "        },",
        "    ),",
    ]


def advice(told: dict[str, Any]) -> str:
    """The schemes to take, for what was timed, and from which length of prompts on fp8 is ahead."""
    lines = ["| you have | take | because |", "|---|---|---|"]
    found = groups(told)
    for shape, (group, *_) in found.items():
        kind = "a mixture of experts" if SHAPES[shape][0] is QWEN3_30B_A3B else "a dense model"
        for key, name in group.timed.items():
            if key.startswith("decode"):
                requests = name.removeprefix("writing, ")
                had = f"{kind}, {requests} at a time, short prompts and long answers"
                lines.append(_advised(group, key, had, "wrote"))
        key = list(group.timed)[-1]
        had = f"{kind}, prompts much longer than the answers"
        lines.append(_advised(group, key, f"{had}, an Ada, Hopper or Blackwell GPU", "read"))
        others = Group((name, row) for name, row in group.items() if name not in IN_FP8)
        lines.append(_advised(others, key, f"{had}, an Ampere GPU (no fp8 products)", "read"))
    lines.append(
        "| little memory: a model that does not fit otherwise, or many long requests | `W4A16` "
        "with `--algo gptq` | a quarter of the weights, and the cache gets the rest |"
    )
    lines.append(
        "| the least loss | `W8A16` with `rtn` | weights have 8 bits, and inputs are not rounded |"
    )
    lines.append(
        "| a checkpoint as DeepSeek publishes them | `FP8_BLOCK` with `rtn` | each block of 128 x "
        "128 weights has a scale |"
    )
    equal = [
        f"- {line}"
        for shape, (group, *_) in found.items()
        for line in break_even(shape, group, "FP8_DYNAMIC", "W4A16")
    ]
    return "\n".join([*lines, "", *equal])


def fastest(group: Group, key: str) -> list[str]:
    """The schemes but bf16, the fastest first; of those near to it, the first in ORDER."""
    order = sorted(set(group) - {"bf16"}, key=lambda scheme: -group[scheme][key])
    least = NEAR * group[order[0]][key]
    near = [scheme for scheme in group if scheme in order and group[scheme][key] >= least]
    return [near[0], *(scheme for scheme in order if scheme != near[0])]


def _advised(group: Group, key: str, had: str, did: str) -> str:
    best, second, *_ = fastest(group, key)
    if group.gain(best, key) < 1:
        why = f"no scheme {did} faster: `{best}` {group.gain(best, key):.2f} times as fast as bf16"
        return f"| {had} | bf16 | {why} |"
    why = f"it {did} {group.gain(best, key):.2f} times as fast as bf16, `{second}` "
    why += f"{group.gain(second, key):.2f} times"
    return f"| {had} | `{best}` with `{ALGORITHMS[best]}` | {why} |"


def break_even(shape: str, group: Group, wide: str, narrow: str) -> list[str]:
    """How long prompts are, in answers, when ``wide`` becomes faster than ``narrow``: sentences."""
    if wide not in group or narrow not in group:
        return []
    read = list(group.timed)[-1]
    reading = 1 / group[narrow][read] - 1 / group[wide][read]
    lines = []
    for key, name in group.timed.items():
        if not key.startswith("decode") or key == "decode 1":
            continue
        writing = 1 / group[wide][key] - 1 / group[narrow][key]
        where = f"{shape}, {name.removeprefix('writing, ')}: `{wide}`"
        saves, loses = f"{abs(reading) * 1e6:.1f}", f"{abs(writing) * 1e6:.1f}"
        if reading > 0 and writing > 0:
            lines.append(
                f"{where} saves {saves} microseconds for a token that is read and loses {loses} "
                f"for one that is written, beside `{narrow}`: it is ahead where prompts are longer "
                f"than {writing / reading:.1f} times the answers."
            )
        elif reading > 0:
            lines.append(
                f"{where} saves {saves} microseconds for a token that is read and {loses} for one "
                f"that is written, beside `{narrow}`: it is ahead whatever the lengths are."
            )
        elif writing > 0:
            lines.append(f"{where} reads and writes no faster than `{narrow}`.")
        else:
            lines.append(
                f"{where} loses {saves} microseconds for a token that is read and saves {loses} "
                f"for one that is written, beside `{narrow}`: it is ahead where prompts are "
                f"shorter than {writing / reading:.1f} times the answers."
            )
    return lines


def page(before: str, told: dict[str, Any]) -> str:
    """The page with the sections in the places of what stood there."""
    for (begin, end), text in ((ADVICE, advice(told)), (GAIN, section(told))):
        head, _, rest = before.partition(begin)
        before = f"{head}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}"
    return before


if __name__ == "__main__":
    told = json.loads(FOUND.read_text("utf-8"))
    for shape, (group, *_) in groups(told).items():
        (DOCS / SHAPES[shape][2]).write_text(picture(group), "utf-8")
    PAGE.write_text(page(PAGE.read_text("utf-8"), told), "utf-8")
    DATA.write_text(data(told), "utf-8")
