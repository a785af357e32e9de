"""Which device a run computes on."""

from __future__ import annotations

import torch

from qplug.errors import QplugError
from qplug.machine.launch import ALONE, Launch


def find_device(name: str, launch: Launch = ALONE) -> torch.device:
    """The device called ``name``; ``auto`` is a GPU if there is one.

    Of several processes each takes a GPU of its own. Raises QplugError if there is none for it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if launch.count > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise QplugError(f"--device {name}: several processes take a GPU each; say cuda")
        if torch.cuda.device_count() < launch.local_count:
            raise QplugError(
                f"{launch.local_count} processes need a GPU each, and {torch.cuda.device_count()} "
                "can be seen; start fewer, or say --device cpu"
            )
        name = f"cuda:{launch.local_rank}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the meta device gives no values
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise QplugError(f"--device {name}: {reason}") from error
    return device
