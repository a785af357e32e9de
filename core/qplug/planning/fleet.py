"""The GPUs that a model is to be served on: ``H100x2``, ``4090``, ``cpu``, or this machine's."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qplug.api.gpus import DEVICES, GPUS, NEAREST, GpuModel, column_of, model_named, named_column
from qplug.errors import QplugError
from qplug.machine.gpus import installed_gpus
from qplug.machine.host_memory import available_memory

_TIMES = re.compile(r"(?P<before>\d{1,3})\s*x\s*(?P<name>.+)|(?P<of>.+?)\s*x\s*(?P<after>\d{1,3})")


@dataclass(frozen=True)
class Fleet:
    """``count`` GPUs of one model, or a CPU.

    ``device`` is a name in ``DEVICES``. ``memory`` is in bytes of one GPU, or of the host.
    ``model`` has the rates of a GPU; None for a CPU, and for a GPU that the table lacks. ``remark``
    is a sentence for people, empty if there is nothing to say.
    """

    name: str
    device: str
    count: int
    memory: int
    model: GpuModel | None = None
    remark: str = ""

    @property
    def is_cpu(self) -> bool:
        """Whether the model is to be served on a CPU."""
        return self.device == "cpu"

    @property
    def title(self) -> str:
        """The name with the count, as ``--gpu`` takes it: ``H100x2``."""
        return self.name if self.count == 1 else f"{self.name}x{self.count}"


def find_fleet(text: str) -> Fleet:
    """Returns the GPUs that ``text`` names: ``H100x2``, ``2x4090``, ``cpu`` or ``auto``.

    ``auto`` is this machine: its GPUs of the first kind, else its CPU. Raises QplugError for an
    unknown name, and for a compute capability (``sm90``), which has no memory.
    """
    if text.lower() == "auto":
        return _installed()
    if text.lower() == "cpu":
        return Fleet("cpu", "cpu", 1, available_memory() or 0)
    name, count = text, 1
    found = None if model_named(text) else _TIMES.fullmatch(text.strip())
    if found:
        name = found["name"] or found["of"]
        count = int(found["before"] or found["after"])
    known = model_named(name)
    if count < 1:
        raise QplugError(f"--gpu {text}: name one GPU or more, such as H100x2")
    if known is None:
        if name.lower() in (*DEVICES, *NEAREST):
            alike = [key for key, gpu in GPUS.items() if gpu.architecture == name.lower()]
            hint = f": {', '.join(alike)}" if alike else ""
            raise QplugError(f"--gpu {text}: a plan needs the memory of the GPU; name it{hint}")
        try:
            named_column(name)
        except QplugError as error:
            raise QplugError(f"--gpu {error}, auto") from None
        raise AssertionError(name)
    key, gpu = known
    column = column_of(gpu.architecture, key)
    return Fleet(key, column.device, count, int(gpu.memory * 2**30), gpu, column.remark)


def _installed() -> Fleet:
    gpus = installed_gpus()
    if not gpus:
        remark = "this machine has no GPU that nvidia-smi lists: planned for its CPU"
        return Fleet("cpu", "cpu", 1, available_memory() or 0, None, remark)
    first = gpus[0]
    alike = [gpu for gpu in gpus if gpu.name == first.name]
    known = model_named(first.name)
    column = column_of(first.architecture, first.name)
    others = len(gpus) - len(alike)
    remarks = [column.remark, f"{others} other GPUs are not counted" if others else ""]
    return Fleet(
        known[0] if known else first.name,
        column.device,
        len(alike),
        first.memory,
        known[1] if known else None,
        "; ".join(filter(None, remarks)),
    )
