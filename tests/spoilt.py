"""Folders that a test spoils on purpose: without checksums, so that other rules must see it."""

from __future__ import annotations

import json
from pathlib import Path

from qplug.output.checksums import CHECKSUM, CHECKSUMS
from qplug.output.manifest import MANIFEST


def forget_checksums(folder: Path) -> Path:
    """Removes the checksums of ``folder``, as if an earlier qplug wrote it; returns ``folder``."""
    record = json.loads((folder / MANIFEST).read_text("utf-8"))
    rest = {key: value for key, value in record.items() if key not in (CHECKSUM, CHECKSUMS)}
    (folder / MANIFEST).write_text(json.dumps(rest), "utf-8")
    return folder
