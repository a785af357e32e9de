"""The page: its numbers are those found, its text is text, and it fetches nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from jinja2 import UndefinedError

from qplug import preset
from qplug.api.events import StageCost
from qplug.api.scheme import CACHES
from qplug.reading.perplexity import Evaluation
from qplug.recipe.recipe import Calibration, Recipe
from qplug.recipe.words import words
from qplug.registry.registry import Registry
from qplug.report import charts
from qplug.report.comparison import Compared, comparison_page
from qplug.report.examine import examine
from qplug.report.page import report_page
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
        cells = found.row(name)
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
    assert len(pictures) == 8
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


def test_names_are_text(hostile: str, page: str, read_page: ReadPage) -> None:
    allowed = {name for name, _ in read_page(page).elements}
    found = read_page(hostile)
    assert {name for name, _ in found.elements} <= allowed
    assert not allowed & {"script", "img", "iframe", "link", "object", "embed", "base", "form"}
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
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"


# --- templates and charts ------------------------------------------------------------------------


def test_templates_escape_every_value() -> None:
    templates = environment().list_templates()
    assert {"report.html.jinja", "comparison.html.jinja", "style.css"} <= {*templates}
    assert environment().autoescape is True
    for name in templates:
        source, _, _ = environment().loader.get_source(environment(), name)
        assert not re.search(r"\|\s*safe\b|autoescape", source), name


def test_a_template_without_a_value_is_not_rendered() -> None:
    with pytest.raises(UndefinedError, match="'rows' is undefined"):
        render("comparison.html.jinja", {})


def test_names_in_charts_are_text(read_page: ReadPage) -> None:
    bars = {EVIL: [[charts.Bar(0, 0.0, 1.0, EVIL, mark=0.5)]]}
    drawn = [
        charts.rows(EVIL, bars, legend=[EVIL], format_=lambda _: EVIL),
        charts.lines(EVIL, {EVIL: [1.0]}, x_label=EVIL, y_label=EVIL, format_=lambda _: EVIL),
        charts.histogram(EVIL, {EVIL: 1}, x_label=EVIL),
    ]
    shapes = {"div", "ul", "li", "svg", "title", "path", "rect", "line", "text"}
    for chart in drawn:
        found = read_page(str(chart))
        assert {name for name, _ in found.elements} <= shapes
        assert EVIL in found.text
        (picture,) = (told for _, told in found.elements if told.get("role") == "img")
        assert EVIL in str(picture["aria-label"])


def test_coordinates_have_a_digit_behind_the_point_at_most() -> None:
    bars = {"a": [[charts.Bar(0, 0.0, 1 / 3, "t")]]}
    drawn = charts.rows("t", bars, legend=(), format_=str)
    numbers = re.findall(r' (?:x|y|width|height|x1|x2|y1|y2)="([^"]*)"', drawn)
    assert len(numbers) > 20
    assert all(re.fullmatch(r"-?\d+(\.[1-9])?", number) for number in numbers)


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
    drawn = charts.lines("t", {"a": values}, x_label="x", y_label="y", format_=str)
    assert "nan" not in drawn
    assert "inf" not in drawn
    way = drawn.partition('<path d="')[2].partition('"')[0]
    assert (
        drawn.count("<title>") == len([v for v in values if v is not None]) + 2
    )  # its own, the legend's
    assert way


def test_a_gap_is_a_gap() -> None:
    values = [3.0, None, 4.0, 5.0]
    drawn = charts.lines("t", {"a": values}, x_label="x", y_label="y", format_=str)
    line = next(part for part in drawn.split("<path ") if 'class="line' in part)
    assert (line.count("M"), line.count("L")) == (2, 1)


def test_points_that_lie_together_are_told_apart() -> None:
    points = [charts.Point(1.0, 2.0, f"p{n}", n) for n in range(4)]
    drawn = charts.scatter("t", points, x_label="x", y_label="y", x_format=str, y_format=str)
    places = [part.partition('">')[0] for part in drawn.split("<text ") if 'start"' in part]
    assert len(set(places)) == 4


def test_sizes_in_words() -> None:
    told = [size(n) for n in (0, 12, 40_000, 3_700_000, 140e9)]
    assert told == ["0", "0.0 kB", "40.0 kB", "3.7 MB", "140.00 GB"]
