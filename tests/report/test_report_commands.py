"""``qplug report``, ``qplug compare`` and ``--report``, as they are typed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import qplug
from qplug.cli.printed_table import print_table
from qplug.output.manifest import read_manifest
from qplug.report.page_file import read_quality

if TYPE_CHECKING:
    from click.testing import Result

    Cli = Callable[..., Result]
    ReadPage = Callable[[str], Any]

TEXT = ("--windows", 2, "--seq-len", 32)
HOW = ("--algo", "rtn", "--group-size", 32, "--backend", "compressed-tensors", "--device", "cpu")


def test_report(cli: Cli, rtn: Path, float_model: Path, read_page: ReadPage) -> None:
    result = cli("report", rtn)
    file = rtn.with_name("llama-rtn.report.html")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"{rtn}: report in {file}\n"
    found = read_page(file.read_text())
    assert found.row("model") == [float_model.name]
    assert "Not known: a folder does not record them." in found.text
    assert cli("report", rtn).exit_code == 0  # its own pages are written anew


def test_report_with_perplexity(
    cli: Cli, rtn: Path, float_model: Path, tmp_path: Path, read_page: ReadPage
) -> None:
    file = tmp_path / "page.html"
    assert cli("report", rtn, "--out", file, "--perplexity", *TEXT).exit_code == 0
    found = read_page(file.read_text())
    for what, model in (("float", float_model), ("quantized", rtn)):
        wanted = qplug.evaluate(str(model), windows=2, seq_len=32).perplexity
        assert float(found.row(what)[0]) == pytest.approx(wanted, rel=1e-5)


def test_report_with_a_verdict(
    cli: Cli, rtn: Path, float_model: Path, tmp_path: Path, read_page: ReadPage
) -> None:
    file = tmp_path / "page.html"
    assert cli("report", rtn, "--out", file, "--check", *TEXT).exit_code == 0
    wanted = qplug.evaluate(str(rtn), windows=2, seq_len=32).perplexity
    quality = read_quality(file, read_manifest(rtn).identity)
    assert quality.perplexity == pytest.approx(wanted, rel=1e-3)
    text = read_page(file.read_text().partition("<main>")[2]).text
    assert f"Quality: {quality.verdict}" in text
    assert "Divergence from the float model" in text
    moved = shutil.copytree(rtn, tmp_path / "moved")
    edit = json.loads((moved / "qplug.json").read_text())
    (moved / "qplug.json").write_text(json.dumps({**edit, "model": "gone"}))
    result = cli("report", moved, "--check", *TEXT)
    assert result.exit_code == 1
    assert "--check: the float model gone is not at hand; pass --against" in result.stderr


def test_report_of_a_run(
    cli: Cli, float_model: Path, rtn: Path, tmp_path: Path, read_page: ReadPage
) -> None:
    out = tmp_path / "llama-rtn"
    result = cli("quantize", float_model, "--out", out, *HOW, "--json", "--report")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    found = read_page((tmp_path / "llama-rtn.report.html").read_text())
    assert {stage["name"] for stage in told["stages"]} >= {"reading", "quantize", "writing"}
    for stage in told["stages"]:
        assert found.row(stage["name"])[0] == f"{stage['seconds']:.2f} s"
    assert found.row("all")[0] == f"{told['seconds']:.2f} s"
    for path in rtn.iterdir():  # the folder says nothing of all that
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_report_of_a_recipe_has_what_it_measured(
    cli: Cli, float_model: Path, tmp_path: Path, read_page: ReadPage
) -> None:
    recipe = {
        "model": str(float_model),
        "pipeline": ["rtn"],
        "scheme": {"preset": "W8A16", "group_size": 32},
        "export": [{"out": str(tmp_path / name), "backend": "fake"} for name in ("a", "b")],
        "eval": [{"at": ["pretrain", "quantized"], "windows": 2, "seq_len": 32}],
    }
    (tmp_path / "r.yml").write_text(json.dumps(recipe))
    words = ("quantize", "--config", tmp_path / "r.yml", "--device", "cpu", "--json", "--report")
    refused = cli(*words[:-1], "--report", tmp_path / "one.html")
    assert "2 folders need a page each; pass --report without a file" in refused.stderr
    assert not (tmp_path / "a").exists()
    result = cli(*words)
    assert result.exit_code == 0, result.output
    before, after = (m["perplexity"] for m in json.loads(result.stdout)["measured"])
    for name in ("a", "b"):
        found = read_page((tmp_path / f"{name}.report.html").read_text())
        assert found.row("float")[0] == f"{before:.4f}"
        assert found.row("quantized")[:2] == [f"{after:.4f}", f"{after / before - 1:+.2%}"]


@pytest.mark.parametrize("file", ["page.txt", "nowhere/page.html", "mine.html"])
def test_what_is_refused_before_the_work(
    file: str, cli: Cli, float_model: Path, rtn: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    complaint = {
        "page.txt": "give it a name that ends in .html",
        "nowhere/page.html": f"{tmp_path / 'nowhere'}: no such folder to write into",
        "mine.html": "was not written by qplug, so it is not overwritten",
    }[file]
    for words in (
        ("quantize", float_model, "--out", tmp_path / "out", *HOW, "--report", tmp_path / file),
        ("report", rtn, "--out", tmp_path / file),
        ("compare", rtn, "--out", tmp_path / file),
    ):
        result = cli(*words)
        assert result.exit_code == 1
        assert complaint in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.html"]
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>"


def test_a_dry_run_writes_no_page(cli: Cli, float_model: Path, tmp_path: Path) -> None:
    words = ("quantize", float_model, "--out", tmp_path / "out", *HOW, "--dry-run", "--report")
    assert cli(*words).exit_code == 0
    assert not [*tmp_path.iterdir()]


def test_a_float_model(cli: Cli, float_model: Path, tmp_path: Path) -> None:
    result = cli("report", float_model, "--out", tmp_path / "page.html")
    assert "is not quantized; there is nothing to report" in result.stderr
    assert not (tmp_path / "page.html").exists()


# --- compare -------------------------------------------------------------------------------------


def test_compare(cli: Cli, rtn: Path, awq: Path, tmp_path: Path, read_page: ReadPage) -> None:
    file = tmp_path / "page.html"
    result = cli("compare", rtn, awq, "--out", file)
    assert result.exit_code == 0, result.output
    head, first, second = result.stdout.splitlines()
    assert head.split()[:4] == ["folder", "algorithms", "scheme", "backend"]
    assert first.split()[:4] == [str(rtn), "rtn", "W4A16", "compressed-tensors"]
    assert second.split()[:2] == [str(awq), "awq"]
    found = read_page(file.read_text())
    assert "Perplexity was not measured: add --perplexity to the command." in found.text
    errors = [n["error"] for n in json.loads((rtn / "qplug.json").read_text())["layers"].values()]
    assert found.row(str(rtn))[5] == f"{sum(errors) / len(errors):.4g}"


def test_a_printed_table_cuts_no_name(
    cli: Cli, rtn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    folder = tmp_path / ("[red]long" * 20)
    folder.symlink_to(rtn)
    stdout = cli("compare", folder, rtn, "--out", tmp_path / "page.html").stdout
    _, first, second = stdout.splitlines()
    assert first.startswith(f"{folder}  rtn ")
    assert second.startswith(str(rtn).ljust(len(str(folder))) + "  rtn ")
    assert "\x1b" not in stdout


def test_columns_of_wide_letters(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([("模型", "a", "x"), ("model", "bb", "")])
    assert capsys.readouterr().out == "模型   a   x\nmodel  bb\n"


def test_compare_perplexities(
    cli: Cli, rtn: Path, float_model: Path, tmp_path: Path, read_page: ReadPage
) -> None:
    file = tmp_path / "page.html"
    words = ("compare", float_model, rtn, "--out", file, "--perplexity", *TEXT, "--json")
    plain = json.loads(cli(*words).stdout)
    assert [row["folder"] for row in plain] == [str(float_model), str(rtn)]
    assert plain[0]["bits per parameter"] == 32
    assert plain[0]["bits per quantized weight"] is None
    page = file.read_text()
    for row in plain:
        wanted = qplug.evaluate(row["folder"], windows=2, seq_len=32).perplexity
        assert row["perplexity"] == pytest.approx(wanted, rel=1e-6)
        assert read_page(page).row(row["folder"])[-1] == f"{row['perplexity']:.4f}"
        assert f"<title>{row['folder']}: " in page  # its point
    assert "2 windows of 32 tokens of demo" in page


def test_compare_names_what_is_no_model(cli: Cli, rtn: Path, tmp_path: Path) -> None:
    result = cli("compare", rtn, tmp_path, "--out", tmp_path / "page.html")
    assert (result.exit_code, result.stderr) == (1, f"Error: {tmp_path}: has no config.json\n")
    assert cli("compare").exit_code == 2
