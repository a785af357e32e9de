"""The page: its numbers are those found, its text is text, and it fetches nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from jinja2 import UndefinedError

import qplug
from qplug import QplugError, preset
from qplug.api.events import StageCost
from qplug.api.scheme import CACHES
from qplug.checkpoint.locate import find_model
from qplug.machine.session import Session
from qplug.output.measured import Measured
from qplug.reading.folder import open_folder
from qplug.reading.perplexity import Evaluation
from qplug.recipe.budget import Budget
from qplug.recipe.recipe import Calibration, Recipe
from qplug.recipe.words import words
from qplug.registry.registry import Registry
from qplug.report import charts
from qplug.report.advice import worst_layers
from qplug.report.comparison import Compared, comparison_page
from qplug.report.examine import examine
from qplug.report.page import report_page
from qplug.report.page_file import read_quality
from qplug.report.remedies import more_bits
from qplug.report.rendering import environment, render
from qplug.report.words import recipe_rows, size

if TYPE_CHECKING:
    from qplug.report.findings import Findings

ReadPage = Callable[[str], Any]
EVIL = "<script>alert(1)</script>\"'><img src=http://evil onerror=alert(1)>&amp;{{ 7 * 7 }}"


@pytest.fixture(scope="module")
def findings(awq: Path) -> Findings:
    return examine(str(awq), Registry.installed())


@pytest.fixture(scope="module")
def page(findings: Findings) -> str:
    measured = {
        "float": [Evaluation("a", 20.0, "demo", 4, 32)],
        "quantized": [Evaluation("b", 21.0, "demo", 4, 32)],
    }
    stages = (StageCost("transform", 3.25, 5_000_000, None), StageCost("new", 0.5, None, None))
    return report_page(findings, measured=measured, stages=stages, seconds=5.0)


def test_numbers_of_layers(page: str, awq: Path, read_page: ReadPage) -> None:
    manifest = json.loads((awq / "qplug.json").read_text())
    found = read_page(page)
    for name, layer in manifest["layers"].items():
        cells = [row[1:] for row in found.rows if row[0] == name][-1]  # after the worst layers
        assert cells[2] == f"{layer['error']:.4g}"
        assert cells[4] == f"{layer['loss']:.4g}"
        low, high, _ = layer["inputs"]["before"]
        assert cells[7] == f"{low:.4g} … {high:.4g}"


def test_numbers_of_the_whole(page: str, findings: Findings, read_page: ReadPage) -> None:
    found, overview = read_page(page), findings.overview
    assert found.row("all tensors")[1] == size(overview.bytes.total)
    bits = f"{overview.bits_per_weight:.3f}"
    assert found.row("quantized weight, scales included") == [bits]
    assert found.row("quantized") == ["21.0000", "+5.00%", "4 windows of 32 tokens of demo"]
    assert found.row("transform")[:3] == ["3.25 s", "5.0 MB", "-"]
    assert found.row("all else")[0] == "1.25 s"
    assert found.row("all")[:2] == ["5.00 s", "5.0 MB"]
    assert found.row("algo") == ["awq"]
    assert found.row("algorithm options") == ["awq.ratios=4, awq.clip_steps=4"]
    assert [found.row(name) for name in ("dataset", "samples", "seq len")] == [
        ["demo"],
        ["4"],
        ["32"],
    ]


def test_every_field_of_a_recipe_that_is_set_has_a_row() -> None:
    recipe = Recipe(
        ("awq", "gptq"),
        overrides=(("*.up", preset("FP8_BLOCK")),),
        ignore=("a", "b"),
        algorithm_options={"gptq": {"damp": 0.1}},
        backend_options={"tp": 2},
        calibration=Calibration(options={"x": 1}, observer_options={"y": 2}, batch_size=3),
        kv_cache=CACHES["fp8"],
        use_qtorch=True,
        budget=Budget(bits=4.5, size="1GB", max_kl=0.1),
    )
    rows = dict(recipe_rows(recipe.to_dict()))
    assert list(rows) == [
        word.name.replace("_", " ") for word in words() if word.name != "group_size"
    ]
    assert rows["algo"] == "awq, gptq"
    assert rows["scheme"] == "W4A16; weights: int4, groups of 128; inputs: as they are"
    assert rows["overrides"] == "*.up: FP8_BLOCK"
    assert rows["algorithm options"] == "gptq.damp=0.1"
    assert rows["kv cache"] == "e4m3, one scale"
    few = dict(recipe_rows(Recipe(calibration=None).to_dict()))
    assert list(few) == ["algo", "scheme", "backend", "mtp", "seed"]


def test_what_is_not_known_is_said(findings: Findings) -> None:
    page = report_page(findings)
    assert "Not known: a folder does not record them." in page
    assert "Not measured." in page
    foreign = replace(findings.overview, recipe={}, model=None)
    assert "qplug did not write this folder" in report_page(replace(findings, overview=foreign))


def test_every_chart_has_its_numbers_beside_it(page: str, read_page: ReadPage) -> None:
    pictures = [told for name, told in read_page(page).elements if told.get("role") == "img"]
    assert len(pictures) == 6 + 2 * 7  # errors of outputs and of weights have one for each kind
    assert all(told["aria-label"] for told in pictures)
    depth = next(row for row in read_page(page).rows if row[0] == "block")
    assert len(depth) == 8


@pytest.fixture(scope="module")
def hostile(findings: Findings) -> str:
    recipe = {**findings.overview.recipe, "ignore": [EVIL], "algorithm_options": {EVIL: {EVIL: 1}}}
    overview = replace(
        findings.overview,
        folder=EVIL,
        model=EVIL,
        architecture=EVIL,
        backend=EVIL,
        notes=(EVIL,),
        recipe=recipe,
        versions={EVIL: EVIL},
        schemes={EVIL: 1},
        serve=EVIL,
    )
    layers = tuple(replace(layer, name=EVIL, kind=EVIL) for layer in findings.layers)
    measured = {EVIL: [Evaluation(EVIL, 2.0, EVIL, 1, 2)]}
    stages = (StageCost(EVIL, 1.0, None, None),)
    told = replace(findings, overview=overview, layers=layers)
    compared = [Compared(overview, Evaluation(EVIL, 2.0, EVIL, 1, 2))] * 2
    page = report_page(told, measured=measured, stages=stages, seconds=2.0)
    return page + comparison_page(compared)


# --- quality, and what to do ---------------------------------------------------------------------


def test_quality_is_on_top(findings: Findings, page: str, read_page: ReadPage) -> None:
    text = read_page(page.partition("<main>")[2]).text
    assert "Perplexity 21.0000, +5.00% against 20.0000 of the float model." in text
    assert text.index("Quality") < text.index("size") < text.index("Worst layers")
    judged = Measured("8 windows", 21.0, 20.0, 0.012, "noticeable", "It is 5 % worse.")
    told = report_page(findings, quality=judged)
    assert 'class="quality fair"' in told
    assert "Quality: noticeable" in read_page(told).text
    assert "Divergence from the float model 0.0120 nats for a token." in told
    assert f"qplug report {findings.overview.folder} --check" in report_page(findings)


def test_quality_is_read_back(findings: Findings, tmp_path: Path) -> None:
    quality = Measured(EVIL, 21.0, None, 0.012, "good", EVIL)
    for number, told in enumerate((quality, None)):
        file = tmp_path / f"{number}.html"
        file.write_text(report_page(findings, quality=told))
        assert read_quality(file, findings.overview.identity) == told
    with pytest.raises(QplugError, match="is on another folder"):
        read_quality(tmp_path / "0.html", "another")
    other = tmp_path / "other.html"
    other.write_text("<p>mine</p>")
    with pytest.raises(QplugError, match="is not a report of qplug"):
        read_quality(other, "")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama that vLLM serves in groups of 128, quantized."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(find_model("qplug:demo") / name, folder / "llama")
    qplug.quantize(str(folder / "llama"), folder / "out", backend="vllm", device="cpu")
    return folder / "out"


def test_the_worst_layers_come_with_commands_that_are_ready(
    wide: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    """One layer is made to stand out, which the engine merges with two others."""
    name = "model.layers.1.self_attn.v_proj"
    options = more_bits(opened(wide), [name])
    assert set(options[name][1::2]) == {
        f"model.layers.1.self_attn.{part}=W8A16" for part in ("q_proj", "k_proj", "v_proj")
    }
    findings = examine(str(wide), Registry.installed())
    layers = tuple(
        replace(layer, loss=9.0 if layer.name == name else 1.0) for layer in findings.layers
    )
    told = worst_layers(replace(findings, layers=layers, options=options))
    assert told is not None
    assert [(row[0].text, row[3].text) for row in told.table.cells] == [
        (name, "W8A16, with 2 merged")
    ]
    assert told.sentence.startswith("One layer stands out: its error is 1.5 times the median")
    assert [step.sentence.partition(" ")[0] for step in told.steps] == ["Store", "Choose"]
    for step in told.steps:
        words = shlex.split(step.command.replace("\\\n", " "))
        assert words[:2] == ["qplug", "quantize"]
        result = cli(*words[1:], "--dry-run", "--device", "cpu", "--samples", 2)
        assert result.exit_code == 0, result.output


def test_a_layer_without_a_scheme_of_more_bits_is_left_float(rtn: Path) -> None:
    folder = opened(rtn)
    name = next(iter(folder.schemes))
    eight = replace(folder, schemes=dict.fromkeys(folder.schemes, preset("W8A16")))
    assert more_bits(eight, [name]) == {name: ("--ignore", name)}


def opened(folder: Path) -> Any:
    return open_folder(str(folder), Session.alone(registry=Registry.installed()))


def test_names_are_text(hostile: str, page: str, read_page: ReadPage) -> None:
    allowed = {name for name, _ in read_page(page).elements}
    found = read_page(hostile)
    assert {name for name, _ in found.elements} <= allowed
    assert [name for name, _ in read_page(page).elements].count("script") == 1
    assert [name for name, _ in found.elements].count("script") == 2  # of two pages
    assert not allowed & {"img", "iframe", "link", "object", "embed", "base", "form"}
    assert found.text.count(EVIL) > 20
    attributes = {key for _, told in found.elements for key in told}
    assert not {key for key in attributes if key.startswith("on")}


def test_nothing_is_fetched(hostile: str, page: str, read_page: ReadPage) -> None:
    for text in (page, hostile):
        elements = read_page(text).elements
        assert len(elements) > 100
        for name, told in elements:
            assert not {"src", "href", "srcset", "data", "action", "poster", "style"} & set(told)
            assert "url(" not in "".join(filter(None, told.values())), name
        style = text.partition("<style>")[2].partition("</style>")[0]
        assert "prefers-color-scheme: dark" in style
        assert "url(" not in style
        assert "@import" not in style
    policy = next(t for n, t in read_page(page).elements if t.get("http-equiv"))
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy["content"] == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )
    assert not re.search(r"fetch|XMLHttp|import|eval|innerHTML|https?:|document\.write", script)


# --- templates and charts ------------------------------------------------------------------------


def test_templates_escape_every_value() -> None:
    templates = environment().list_templates()
    assert {"report.html.jinja", "comparison.html.jinja", "style.css", "page.js"} <= {*templates}
    assert environment().autoescape is True
    for name in templates:
        source, _, _ = environment().loader.get_source(environment(), name)
        assert not re.search(r"\|\s*safe\b|autoescape", source), name


def test_a_template_without_a_value_is_not_rendered() -> None:
    with pytest.raises(UndefinedError, match="'title' is undefined"):
        render("comparison.html.jinja", {})


def test_names_in_charts_are_text(read_page: ReadPage) -> None:
    bars = {EVIL: [[charts.Bar(0, 0.0, 1.0, EVIL, mark=0.5)]]}
    drawn = [
        charts.rows(EVIL, bars, legend=[EVIL], format_=lambda _: EVIL),
        charts.panels(EVIL, {EVIL: {EVIL: [1.0]}}, x_label=EVIL, format_=lambda _: EVIL),
        charts.histogram(EVIL, {EVIL: 1}, x_label=EVIL),
    ]
    shapes = {
        "div",
        "figure",
        "figcaption",
        "ul",
        "li",
        "svg",
        "title",
        "path",
        "rect",
        "line",
        "text",
    }
    for chart in drawn:
        found = read_page(str(chart))
        assert {name for name, _ in found.elements} <= shapes
        assert EVIL in found.text
        (picture,) = (told for _, told in found.elements if told.get("role") == "img")
        assert EVIL in str(picture["aria-label"])


def test_coordinates_have_two_digits_behind_the_point_at_most() -> None:
    bars = {"a": [[charts.Bar(0, 0.0, 1 / 3, "t")]]}
    drawn = charts.rows("t", bars, legend=(), format_=str)
    numbers = re.findall(r' (?:x|y|width|height|x1|x2|y1|y2)="([^"]*)"', drawn)
    assert len(numbers) > 20
    assert all(re.fullmatch(r"-?\d+(\.\d?[1-9])?%?", number) for number in numbers)


def test_every_colour_has_a_value_for_light_and_for_dark() -> None:
    style, _, _ = environment().loader.get_source(environment(), "style.css")
    for number in range(charts.COLOURS):
        assert style.count(f"--c{number}: #") == 2
        assert f".bar.c{number} {{ fill: var(--c{number}); }}" in style
        assert f".line.c{number} {{ stroke: var(--c{number}); }}" in style


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 0.11, [0, 0.025, 0.05, 0.075, 0.1, 0.125]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (3, 3, [3, 3.2, 3.4, 3.6, 3.8, 4]),
        (0, 9e9, [0, 2e9, 4e9, 6e9, 8e9, 10e9]),
    ],
)
def test_ticks(low: float, high: float, wanted: list[float]) -> None:
    assert charts.nice_ticks(low, high) == pytest.approx(wanted)


@pytest.mark.parametrize("values", [[0.0, 0.0], [1e-30, 2e-30], [5.0], [3.0, None, 4.0]])
def test_lines_of_any_values(values: list[float | None]) -> None:
    drawn = charts.panels("t", {"kind": {"": values}}, x_label="block", format_=str)
    assert "nan" not in drawn
    assert "inf" not in drawn
    told = re.findall("<title>(.*?)</title>", drawn)
    known = {n: value for n, value in enumerate(values) if value is not None}
    assert told == [f"kind, block {n}: {value}" for n, value in known.items()]
    (label,) = re.findall('aria-label="(.*?)"', drawn)
    assert label.startswith(f"t, kind: largest {max(known.values())} in block ")
    assert drawn.partition('<path d="')[2].partition('"')[0]


def test_a_gap_is_a_gap() -> None:
    values = [3.0, None, 4.0, 5.0]
    drawn = charts.panels("t", {"kind": {"": values}}, x_label="x", format_=str)
    line = next(part for part in drawn.split("<path ") if 'class="line' in part)
    assert (line.count("M"), line.count("L")) == (2, 1)


def test_axes_begin_at_zero_or_say_that_they_do_not() -> None:
    panel = charts.panels("t", {"kind": {"": [0.095, 0.1]}}, x_label="x", format_=str)
    rows = charts.rows("t", {"a": [[charts.Bar(0, 3.0, 4.0, "b")]]}, legend=(), format_=str)
    columns = charts.histogram("t", {"a": 900, "b": 1000}, x_label="x")
    for drawn in (panel, rows, columns):
        texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawn)
        assert {"0", "0.0"} & {*texts}, texts
    points = [charts.Point(10.0, 19.5, "p", 0), charts.Point(12.0, 20.5, "q", 1)]
    drawn = charts.scatter("t", points, x_label="x", y_label="Loss", x_format=str, y_format=str)
    assert "Loss, upwards; its axis begins at 19.25, not at 0" in drawn


def test_several_runs_share_a_chart() -> None:
    lines = {"up": {"a": [1.0, 2.0], "b": [2.0]}, "down": {"a": [0.5], "b": ()}}
    drawn = charts.panels("t", lines, x_label="block", format_=str)
    assert re.findall("<title>(.*?)</title>", drawn) == [
        *("up, block 0: a 1.0; b 2.0", "up, block 1: a 2.0", "down, block 0: a 0.5"),
    ]
    assert re.findall("</svg></svg>([^<]+)</li>", drawn) == ["a", "b"]


def test_points_that_lie_together_are_told_apart() -> None:
    points = [charts.Point(1.0, 2.0, f"p{n}", n) for n in range(4)]
    drawn = charts.scatter("t", points, x_label="x", y_label="y", x_format=str, y_format=str)
    places = re.findall(r"<text ([^>]*)>[1-4]</text>", drawn)
    assert len(places) == len({*places}) == 4


def test_sizes_in_words() -> None:
    told = [size(n) for n in (0, 12, 40_000, 3_700_000, 140e9)]
    assert told == ["0", "0.0 kB", "40.0 kB", "3.7 MB", "140.00 GB"]
