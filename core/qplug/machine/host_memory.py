"""The free memory of the host, read without importing torch."""

from __future__ import annotations

import os
import re


def available_memory() -> int | None:
    """Returns the bytes that programs can still take; None if the system does not say."""
    found = re.search(rb"MemAvailable:\s*(\d+) kB", _meminfo())
    return int(found[1]) * 1024 if found else None


def _meminfo() -> bytes:
    """What Linux says of its memory; empty on other systems."""
    try:
        file = os.open("/proc/meminfo", os.O_RDONLY)
    except OSError:
        return b""
    try:
        return os.read(file, 1 << 14)
    finally:
        os.close(file)
