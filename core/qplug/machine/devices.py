"""Chooses the device that a run computes on."""

from __future__ import annotations

import torch

from qplug.errors import QplugError
from qplug.machine.launch import ALONE, Launch


def find_device(name: str, launch: Launch = ALONE) -> torch.device:
    """Returns the device called ``name``; ``auto`` is a GPU if there is one, else the CPU.

    If ``launch`` has several processes, ``cuda`` gives each process its own GPU. Raises QplugError
    if the device does not exist or cannot hold values, or if there are fewer GPUs than processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if launch.count > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise QplugError(f"--device {name}: several processes need a GPU each; use cuda")
        if torch.cuda.device_count() < launch.local_count:
            raise QplugError(
                f"{launch.local_count} processes need a GPU each, and {torch.cuda.device_count()} "
                "can be seen; start fewer, or use --device cpu"
            )
        name = f"cuda:{launch.local_rank}"
    kind = name.partition(":")[0]
    if kind == "cuda" and not torch.cuda.is_available():
        raise QplugError(f"--device {name}: {_why_no_gpu()}; or use --device cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # refuses the meta device, which holds no values
    except (RuntimeError, AssertionError) as error:
        raise QplugError(f"--device {name}: {_wrong_name(kind)}") from error
    return device


def _why_no_gpu() -> str:
    """Says why torch can use no GPU, and what to do about it."""
    if not torch.backends.cuda.is_built():
        return "this torch is built without CUDA; install a torch with CUDA"
    return "torch sees no GPU; check nvidia-smi, its driver and CUDA_VISIBLE_DEVICES"


def _wrong_name(kind: str) -> str:
    """Says which names a device may have; ``kind`` is the part before the colon."""
    count = torch.cuda.device_count()
    if kind == "cuda" and count:
        return f"torch cannot use this GPU; there are cuda:0 to cuda:{count - 1}"
    return "torch cannot use such a device here; use auto, cpu, or cuda[:N]"
