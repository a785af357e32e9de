"""The GPUs of this machine and the architectures of GPUs by name, found without importing torch."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from shutil import which

from qplug.api.limits import DEVICES
from qplug.errors import QplugError, did_you_mean

#: CUDA's compute capability of each GPU, by the name that users know.
GPUS = {
    "A100": "sm80",
    "A30": "sm80",
    "A10": "sm86",
    "A10G": "sm86",
    "A40": "sm86",
    "A6000": "sm86",
    "3080": "sm86",
    "3090": "sm86",
    "L4": "sm89",
    "L40": "sm89",
    "L40S": "sm89",
    "4080": "sm89",
    "4090": "sm89",
    "H20": "sm90",
    "H100": "sm90",
    "H200": "sm90",
    "GH200": "sm90",
    "B100": "sm100",
    "B200": "sm100",
    "GB200": "sm100",
    "B300": "sm103",
    "5080": "sm120",
    "5090": "sm120",
}

#: Compute capabilities that no engine's table has, and the nearest one that tables have.
_NEAREST = {"sm86": "sm80", "sm87": "sm80", "sm103": "sm100", "sm120": "sm100", "sm121": "sm100"}

#: Words in the full names of GPUs that are no part of the short name.
_LEFT_OUT = {"nvidia", "geforce", "rtx", "tesla"}

_TIMEOUT = 5  # seconds


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine: its name, its memory in bytes, and its compute capability (sm90)."""

    name: str
    memory: int
    architecture: str


@dataclass(frozen=True)
class Column:
    """A column of the engines' tables: a name in ``DEVICES``, and a remark if it only comes near.

    The remark is empty if the column is that of the GPU.
    """

    device: str
    remark: str = ""


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
        found = _column(gpus[0].architecture, gpus[0].name)
        return found if found.remark else Column(found.device, f"{gpus[0].name}: {found.device}")
    short = "".join(word for word in gpu.lower().replace("-", " ").split() if word not in _LEFT_OUT)
    by_name = {name.lower(): architecture for name, architecture in GPUS.items()}
    known = {*DEVICES, *_NEAREST}
    architecture = by_name.get(short, short)
    if architecture not in known:
        names = [*GPUS, *sorted(known), "auto"]
        hint = did_you_mean(gpu.upper(), GPUS) or did_you_mean(gpu.lower(), names)
        raise QplugError(f"--gpu {gpu}: not a known GPU.{hint} There are: {', '.join(names)}")
    return _column(architecture, gpu)


def _column(architecture: str, name: str) -> Column:
    if architecture in DEVICES:
        return Column(architecture)
    near = _NEAREST.get(architecture)
    if near is None:
        raise QplugError(f"{name} is {architecture}, which no engine's table has")
    title = architecture if name == architecture else f"{name} is {architecture}"
    return Column(near, f"{title}; no table has it, the nearest is {near}, which may differ")
