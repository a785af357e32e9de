"""Lets torch use one thread, for results that do not depend on the number of threads.

Matrix products, triangular solves and sums over rows give the same bytes with any number of
threads. Factorisations do not: the library divides a matrix by the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """A context in which torch uses one thread of the CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
