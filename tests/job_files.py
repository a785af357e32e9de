"""LLMC's YAML in miniature, with its keys and none of its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import dedent, indent

import pytest

from qplug.recipe.check import check_names
from qplug.recipe.files import ReadJob, read_job
from qplug.registry.registry import Registry

ReadText = Callable[..., ReadJob]
WriteLlmc = Callable[..., str]

WEIGHT = "{bit: 4, symmetric: True, granularity: per_group, group_size: 128}"


@pytest.fixture(scope="session")
def registry() -> Registry:
    return Registry.installed()


@pytest.fixture
def read_text(tmp_path: Path, registry: Registry) -> ReadText:
    """``read_text("quant: ...")``: what a file with this text asks for, its names checked."""

    def read_file(text: str, name: str = "f.yml") -> ReadJob:
        file = tmp_path / name
        file.write_text(dedent(text))
        read = read_job(file, registry)
        check_names(read.job, registry)
        return read

    return read_file


@pytest.fixture(scope="session")
def llmc() -> WriteLlmc:
    """``llmc(method="Awq", act="{...}", save="save_sgl: True")``: a file with these parts."""

    def write(
        *,
        method: str = "RTN",
        weight: str = WEIGHT,
        act: str = "",
        special: str = "",
        quant: str = "",
        calib: str = "",
        evaluate: str = "",
        save: str = "",
        model: str = "",
        more: str = "",
    ) -> str:
        def block(name: str, body: str, deep: int = 0) -> str:
            inner = indent(dedent(body).strip("\n"), "    ")
            return indent(f"{name}:\n{inner}\n", "    " * deep) if body else ""

        parts = [
            "base:\n    seed: &seed 42\n",
            block("model", model),
            block("calib", calib),
            block("eval", evaluate),
            f"quant:\n    method: {method}\n    weight: {weight}\n",
            f"    act: {act}\n" if act else "",
            block("special", special, 1),
            indent(dedent(quant).strip("\n"), "    ") + "\n" if quant else "",
            block("save", save),
            dedent(more),
        ]
        return "".join(parts)

    return write
