"""The GPUs of this machine, found without importing torch."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from shutil import which

from qplug.api.gpus import Column, column_of, named_column
from qplug.errors import QplugError

_TIMEOUT = 5  # seconds


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine: its name, its memory in bytes, and its compute capability (sm90)."""

    name: str
    memory: int
    architecture: str


def installed_gpus() -> list[Gpu]:
    """Returns the GPUs that NVIDIA's driver lists; none without a driver."""
    program = which("nvidia-smi")
    if program is None:
        return []
    query = ["--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(  # noqa: S603 - of the driver
            [program, *query], capture_output=True, text=True, check=True, timeout=_TIMEOUT
        )
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return [
        Gpu(row[0], int(row[1]) << 20, f"sm{row[2].replace('.', '')}")
        for row in rows
        if len(row) == 3 and row[1].isdigit()
    ]


def column_for(gpu: str) -> Column:
    """Returns the column for ``gpu``: a name in ``GPUS``, ``sm90``, ``cpu`` or ``auto``.

    ``auto`` is the first GPU of this machine, or its CPU. Raises QplugError for another name.
    """
    if gpu.lower() == "auto":
        gpus = installed_gpus()
        if not gpus:
            return Column("cpu", "this machine has no GPU that nvidia-smi lists: cpu")
        found = column_of(gpus[0].architecture, gpus[0].name)
        return found if found.remark else Column(found.device, f"{gpus[0].name}: {found.device}")
    try:
        return named_column(gpu)
    except QplugError as error:
        raise QplugError(f"--gpu {error}, auto") from None
