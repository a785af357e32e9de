"""Uses a GPU for the first time while the process still imports the code of models.

CUDA starts, libraries are loaded, and the first call of a kernel compiles it, which takes a second
or two. Compilers leave the interpreter to the thread that imports.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from qplug.api import Linear
from qplug.api.algorithm import Effort
from qplug.api.scheme import QuantArgs
from qplug.calibration.channels import Channels
from qplug.machine.session import Session
from qplug.numerics.clipping import scaled_differences, search_clip, searched_blocks
from qplug.numerics.losses import output_errors
from qplug.run.stages import Stages

#: A first use of something, whose result nobody needs.
FirstUse: TypeAlias = Callable[[], object]

#: Channels of tensors that kernels are compiled for: those of real models are multiples, too.
_WIDTH = 256


@contextmanager
def warmed_up(stages: Stages, session: Session) -> Iterator[None]:
    """A context in which a thread uses the GPU of ``session`` for what ``stages`` will do there."""
    device = session.device
    if device.type != "cuda" or not stages.needs_data:
        yield
        return
    grids = dict.fromkeys(scheme.weights for scheme in stages.recipe.schemes)
    uses = first_uses([*grids], stages.efforts or frozenset(), device)
    with beside(partial(_on, device, use) for use in uses):
        yield


@contextmanager
def beside(uses: Iterable[FirstUse]) -> Iterator[None]:
    """A context in which a thread makes ``uses``; its end waits for the one that was begun.

    An error is not reported: what fails here fails again where it is needed, or was not needed.
    """
    ended = threading.Event()

    def make() -> None:
        for use in uses:
            if ended.is_set():
                return
            with suppress(Exception):
                use()

    thread = threading.Thread(target=make, name="qplug-warm-up", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def first_uses(
    grids: Sequence[QuantArgs], efforts: frozenset[Effort], device: torch.device
) -> Iterator[FirstUse]:
    """Yields what a calibrated run uses ``device`` for, in about the order of the run.

    Users of cuBLAS come first: the run frees its workspaces once it has imported all code.
    ``grids``: those of the weights. ``efforts``: of the run's algorithms, as far as they are known.
    """
    yield partial(_multiply, device)
    if "solves" in efforts:
        yield partial(_factor, device)
    yield partial(_add_channels, device)
    for args in grids:
        if "searches" in efforts:
            yield partial(_scale, args, device)
        if args.bits < 8:
            yield partial(_clip, args, device)
    yield partial(_judge, device)


def _on(device: torch.device, use: FirstUse) -> None:
    with torch.cuda.device(device):  # each thread has a current device of its own
        use()


def _multiply(device: torch.device) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        matrix = torch.zeros(_WIDTH, _WIDTH, dtype=dtype, device=device)
        torch.mm(matrix, matrix)


def _add_channels(device: torch.device) -> None:
    rows = torch.zeros(_WIDTH, _WIDTH, dtype=torch.bfloat16, device=device)
    Channels.of_no_rows(1, _WIDTH, device).add(rows)


def _scale(args: QuantArgs, device: torch.device) -> None:
    eye, ones = _identity(device)[None], torch.ones(1, _WIDTH, device=device)
    blocks = searched_blocks(eye, args)
    moved = scaled_differences(eye, args, ones, blocks, steps=1, smallest=0.6)
    output_errors(moved, eye)


def _clip(args: QuantArgs, device: torch.device) -> None:
    eye = _identity(device)
    search_clip(Linear("", eye, args), eye, steps=2, smallest=0.6)


def _judge(device: torch.device) -> None:
    eye = _identity(device)[None]
    output_errors(eye, eye)


def _factor(device: torch.device) -> None:
    eye = _identity(device)
    lower, _ = torch.linalg.cholesky_ex(eye)
    torch.linalg.solve_triangular(lower, eye, upper=False)


def _identity(device: torch.device) -> Tensor:
    """A weight, or a Gram matrix: drawn values would move the generator of the run."""
    return torch.eye(_WIDTH, device=device)
