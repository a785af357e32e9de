"""Reads LLMC's ``calib`` and ``eval`` sections: datasets by name and path, and their windows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qplug.recipe.recipe import Calibration, Measurement, Sampling, Stage
from qplug.recipe.yaml_tree import Node, Section

#: LLMC's names for a dataset of the user's own, and LLMC's names for qplug's dataset plugins.
_OWN = ("custom", "custom_txt", "custom_ppl")
_ALIASES = {"pile": "pileval"}
#: LLMC's datasets that contain more than text.
_NOT_TEXT = ("custom_mm", "images", "t2v", "i2v", "vlm_datastes")

#: How LLMC's preprocs cut windows.
PREPROCS: dict[str, Sampling] = {
    "wikitext2_gptq": "windows",
    "ptb_gptq": "windows",
    "pileval_omni": "windows",
    "random_truncate_txt": "windows",
    "c4_gptq": "documents",
    "pile_gptq": "documents",
    "txt_general_preproc": "leading",
    "general": "leading",
    "pileval_smooth": "leading",
    "pileval_awq": "packed",
}

#: How datasets cut windows by default; the others use ``windows``.
_USUAL: dict[str, Sampling] = {"pileval": "leading", "c4": "documents"}

STAGES: dict[str, Stage] = {
    "pretrain": "pretrain",
    "transformed": "transformed",
    "fake_quant": "quantized",
    "fake-quant": "quantized",
}

_MEMORY = ("bs", "download", "inference_per_block", "num_workers")
_TEXT_SUFFIXES = (".txt", ".md", ".jsonl")
#: Files in a copy of a repository, or in a folder that ``save_to_disk`` wrote.
_TABLES = ("dataset_dict.json", "dataset_info.json", "state.json", "**/*.parquet", "**/*.arrow")
_PACKED_TABLES = ("**/*.zst", "**/*.gz")


@dataclass(frozen=True)
class Text:
    """A dataset plugin with its options. ``whole``: the text is one file without documents."""

    dataset: str
    options: dict[str, Any]
    whole: bool = False


def read_calibration(calib: Section, usual: Calibration) -> Calibration:
    """Read the calibration data in a ``calib`` section; missing values come from ``usual``.

    Warnings go into ``calib.warnings``. Raises QplugError, with file and line, for a wrong value.
    """
    calib.leave("bs", "seed", "type", "load_from_txt")  # base.seed draws the windows
    samples, length = calib.whole("n_samples", least=1), calib.whole("seq_len", least=1)
    text = _text(calib, calib.need("name"), own_field="question")
    sampling: Sampling = "dataset"
    preproc = calib.get("preproc")
    if preproc is not None and preproc.value is not False:
        sampling = PREPROCS[preproc.word(PREPROCS)]
        if text.whole and sampling != "windows":
            calib.warn("preproc", "the file is one document: windows begin anywhere in it")
            sampling = "windows"
        if sampling == _USUAL.get(text.dataset, "windows"):
            sampling = "dataset"
    chat = calib.switch("apply_chat_template") and text.dataset == "text"
    if chat:  # a question is a conversation, and conversations are padded
        text = replace(text, options={**text.options, "role": "user"})
    for key in ("padding", "apply_chat_template", "add_answer"):
        if calib.switch(key) and not (chat and key != "add_answer"):
            calib.warn(key, "no effect: qplug leaves the text unchanged, and fills all windows")
    calib.warn_of_rest()
    return replace(
        usual,
        dataset=text.dataset,
        options=text.options,
        samples=samples or usual.samples,
        seq_len=length or usual.seq_len,
        sampling=sampling,
    )


def read_measurements(node: Node, warnings: list[str]) -> list[tuple[Measurement, str]]:
    """Read the measurements in an ``eval`` section, or in a list of them, with their places.

    Raises QplugError, with file and line, for a wrong value.
    """
    return [
        measurement
        for item in _items(node)
        for measurement in _measurements(Section(item, warnings))
    ]


def _items(node: Node) -> tuple[Node, ...]:
    return (node,) if isinstance(node.value, dict) else node.items()


def _measurements(section: Section) -> list[tuple[Measurement, str]]:
    section.leave(*_MEMORY, "load_from_txt")
    kind, stages = section.get("type"), _stages(section)
    names = section.need("name").items()
    length, path = section.whole("seq_len", least=2), section.get("path")
    if kind is not None and kind.word() != "ppl":
        warning = f"left out: qplug measures perplexity (ppl), not {kind.word()}"
        section.warn("type", warning)
        section.leave("num_samples", "num_eval_tokens", "max_new_tokens", "apply_chat_template")
        section.leave("res_path", "format_tabs", "instruction", "add_chat_temp")
        stages = ()
    for key in ("tasks", "eval_token_consist"):
        if key in section:
            section.warn(key, "no effect: qplug measures perplexity")
    measurements = []
    for name in names if stages else ():
        under = path if len(names) == 1 or path is None else _below(path, name.word())
        text = _text(section, name, own_field="question", path=under)
        windows = 256 if text.dataset == "c4" else None  # as in published perplexities of C4
        measurement = Measurement(stages, text.dataset, text.options, length or 2048, windows)
        measurements.append((measurement, str(section.place)))
    section.warn_of_rest()
    return measurements


def _stages(section: Section) -> tuple[Stage, ...]:
    stages: list[Stage] = []
    node = section.need("eval_pos")
    for item in node.items():
        stage = STAGES.get(item.word())
        if stage is None:
            warning = f"{item.word()!r} is left out; allowed: {', '.join(STAGES)}"
            section.warnings.append(f"{item.place}: {warning}")
        elif stage not in stages:
            stages.append(stage)
    return tuple(stages)


def _below(path: Node, name: str) -> Node:
    return Node(path.place, str(Path(path.word()) / name))


def _text(section: Section, name: Node, *, own_field: str, path: Node | None = None) -> Text:
    """The dataset called ``name``, read from ``path`` unless the section says to download it."""
    given = name.word()
    if given in _NOT_TEXT:
        raise name.place.error(f"{given!r} contains more than text, but qplug reads only text")
    dataset = _ALIASES.get(given, given)
    path, download = path or section.get("path"), section.switch("download")
    if path is None or download:
        return Text(dataset, {})
    place = Path(path.word()).expanduser()
    if not place.exists():
        section.warnings.append(f"{path.place}: {place}: no such file or folder")
    if given in _OWN:
        listed = place / "samples.json" if place.is_dir() else place
        if listed.suffix == ".json":
            return Text("text", {"path": str(listed), "field": own_field})
        return Text("text", {"path": str(place)}, place.is_file() and listed.suffix != ".jsonl")
    if place.is_file():
        whole = place.suffix not in (".jsonl", ".json")
        return Text("text", {"path": str(place)}, whole)
    if place.is_dir() and not _holds_table(place) and _holds_text(place):
        return Text("text", {"path": str(place)})
    return Text(dataset, {"path": str(place)})


def _holds_table(folder: Path) -> bool:
    return any(next(folder.glob(p), None) for p in (*_TABLES, *_PACKED_TABLES))


def _holds_text(folder: Path) -> bool:
    return any(file.suffix in _TEXT_SUFFIXES for file in folder.rglob("*"))
