"""Memory that runs out: recognised in any of torch's words, and named with what was held."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from qplug.errors import QplugError
from qplug.machine.host_memory import available_memory

#: What torch says in a RuntimeError: its allocator for CPUs, and CUDA's libraries.
_WORDS = (
    *("DefaultCPUAllocator", "not enough memory", "out of memory", "can't allocate memory"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
)


@contextmanager
def naming_memory(held: Callable[[], str]) -> Iterator[None]:
    """A context in which an exception that says that memory ran out becomes a QplugError.

    ``held`` returns what the memory was needed for, and what to change, after the words "out of
    memory".
    """
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        raise QplugError(f"out of memory: {held()}") from error


def ran_out(error: BaseException | None) -> bool:
    """Whether ``error``, or an exception that it was raised from, says that memory ran out."""
    while error is not None:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return True
        if isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS):
            return True
        error = error.__cause__
    return False


def gibibytes(size: float) -> str:
    """``size`` in bytes as text, such as ``1.5 GiB``."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def free_memory(device: torch.device) -> int | None:
    """The bytes that are free on ``device``, with a reserve; None if the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (free + cached) * 9 // 10
    available = available_memory()
    return None if available is None else available * 9 // 10


def free_workspaces(device: torch.device) -> None:
    """Frees the memory in which cuBLAS works on ``device``.

    On an H200 these are 128 MiB for each thread that used it. torch keeps them as long as the
    process lives, and takes them again where a thread needs them.
    """
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()


def memory_of_each(device: torch.device, processes: int, stated: int | None) -> int | None:
    """The bytes that a block may take in each of ``processes``; None if nothing limits them.

    ``stated``: what the user allows. Otherwise these are the free bytes of ``device``; on a CPU the
    processes may share the memory of one host.
    """
    free = free_memory(device) if stated is None else stated
    if stated is not None or free is None or device.type != "cpu":
        return free
    return free // processes


def parse_size(text: str) -> int:
    """The bytes that ``text`` says, such as ``20GiB``, ``20GB`` or ``500MiB``.

    Raises QplugError for other text.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)\s*", text, re.IGNORECASE)
    if found is None:
        raise QplugError(f"{text}: is no size; write 20GiB, 20GB or 500MiB")
    number, unit = found.groups()
    base = 1024 if "i" in unit.lower() else 1000
    return int(float(number) * base ** (" KMGT".index(unit[0].upper())))
