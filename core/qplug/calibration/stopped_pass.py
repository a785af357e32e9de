"""Forward passes of a whole model that stop at every decoder block.

A pass runs in a thread of its own and waits there while the block is computed elsewhere, for all
batches and as often as needed. So whatever a model does between its blocks, and whatever it hands
to them, comes out as in the model itself: nothing is assumed of it. One thread runs at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qplug.errors import QplugError
from qplug.model.block_call import BlockCall, Output
from qplug.model.block_proxy import BlockProxy


@dataclass(frozen=True, eq=False)
class Stop:
    """A pass waits at ``block`` (its name), which the model called with ``call``."""

    block: str
    call: BlockCall


class StoppedPass:
    """A forward pass, ``run``, that waits before its first block until ``go_on``."""

    def __init__(self, run: Callable[[], object], passes: StoppingBlocks) -> None:
        self._turn, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._stop: Stop | None = None
        self._output: Output = None
        self._error: BaseException | None = None
        self._abandoned = False
        self._thread = threading.Thread(
            target=self._run, args=(run, passes, self), name="qplug-pass", daemon=True
        )

    def start(self) -> Stop | None:
        """Runs the model up to the first block; None if it calls no block."""
        threads = torch.get_num_threads()
        try:
            self._thread.start()
        except RuntimeError as error:
            raise QplugError(
                "the system starts no more threads, of which each calibration batch takes one; "
                "take fewer --samples, or a larger --batch-size"
            ) from error
        self._stopped.acquire()
        torch.set_num_threads(threads)  # the thread has changed the number for later threads
        return self._result()

    def go_on(self, output: Output) -> Stop | None:
        """Hands the ``output`` of the block to the model, and runs it up to the next block.

        Returns None if the model calls no more block. Raises what the model raises.
        """
        self._output = output
        self._turn.release()
        self._stopped.acquire()
        return self._result()

    def abandon(self) -> None:
        """Ends the pass where it stands."""
        if self._thread.is_alive():
            self._abandoned = True
            self._turn.release()
            self._thread.join()
        self._stop = self._output = None

    def wait_at(self, block: str, call: BlockCall) -> Output:
        """Called in the thread of the pass: the output of ``block``, once it has been computed."""
        self._stop = Stop(block, call)
        del call
        self._stopped.release()
        self._turn.acquire()
        if self._abandoned:
            raise _AbandonedError
        output, self._output = self._output, None
        return output

    def _result(self) -> Stop | None:
        stop, self._stop = self._stop, None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return stop

    @staticmethod
    def _run(run: Callable[[], object], passes: StoppingBlocks, self: StoppedPass) -> None:
        # Each thread would keep a pool of threads, one for each core, of which none ever works.
        torch.set_num_threads(1)
        passes.current.stopped = self
        try:
            with torch.no_grad():
                run()
        except _AbandonedError:
            pass
        except BaseException as error:  # raised again where the pass was started
            self._error = error
        finally:
            self._stopped.release()


class StoppingBlocks:
    """Puts modules in the place of ``blocks`` of ``model``, at which its passes stop.

    ``blocks``: the modules by name.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
        self.current = threading.local()
        places = {id(block): name for name, block in blocks.items()}
        for parent in [*model.modules()]:
            for local, child in parent._modules.items():
                if id(child) in places and child is not None:
                    parent._modules[local] = _StoppingBlock(child, places[id(child)], self)

    def begin(self, run: Callable[[], object]) -> StoppedPass:
        """A pass of the model, which ``run`` calls, before its start."""
        return StoppedPass(run, self)


class _StoppingBlock(BlockProxy):
    """Stops the pass that calls it, and returns what the pass is given."""

    def __init__(self, block: nn.Module, name: str, passes: StoppingBlocks) -> None:
        super().__init__(block)
        self._name, self._passes = name, passes

    def forward(self, *args: Any, **kwargs: Any) -> Output:
        stopped: StoppedPass = self._passes.current.stopped
        return stopped.wait_at(self._name, BlockCall.of(args, kwargs))


class _AbandonedError(BaseException):
    """Ends a pass that is not needed any more; no model catches it."""
