"""Adds what was measured of a result to its model card, and keeps its checksums right."""

from __future__ import annotations

from pathlib import Path

from qplug.errors import QplugError
from qplug.files.json_text import read_json
from qplug.files.regular import read_text
from qplug.output.card import CARD, LONGEST, with_quality
from qplug.output.checksums import CHECKSUM, CHECKSUMS, file_checksum
from qplug.output.manifest import MANIFEST
from qplug.output.measured import Measured
from qplug.output.result_files import manifest_text


def add_quality(folder: Path, measured: Measured) -> bool:
    """Writes ``measured`` into the model card of ``folder``; returns whether the card changed.

    The checksum of the card in qplug.json follows. Raises QplugError if the folder has no card that
    qplug wrote, or if it cannot be written.
    """
    try:
        card = read_text(folder / CARD, LONGEST, within=folder)
        record = read_json(folder / MANIFEST, within=folder)
    except FileNotFoundError as error:
        raise QplugError(f"{folder}: has no {CARD} of qplug; nothing is added") from error
    text = with_quality(card, measured, folder.resolve().name)
    if text == card:
        return False
    try:
        draft = _beside(folder / CARD, text)
        sums = record.get(CHECKSUMS)
        if isinstance(sums, dict) and CARD in sums.get("files", {}):
            sums["files"][CARD] = file_checksum(draft)
            rest = {k: v for k, v in record.items() if k not in (CHECKSUMS, CHECKSUM)}
            manifest = _beside(folder / MANIFEST, manifest_text(rest, sums))
            draft.replace(folder / CARD)
            manifest.replace(folder / MANIFEST)
        else:
            draft.replace(folder / CARD)
    except OSError as error:
        raise QplugError(f"{folder / CARD}: cannot be written: {error.strerror}") from error
    return True


def _beside(file: Path, text: str) -> Path:
    """Writes ``text`` into a hidden file next to ``file``, and returns its path."""
    draft = file.with_name(f".{file.name}.partial")
    draft.write_text(text, encoding="utf-8")
    return draft
