"""The session of one command: plugins, a device, processes that share the work, a stopwatch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from qplug.machine.devices import find_device
from qplug.machine.exchange import join
from qplug.machine.launch import Launch
from qplug.machine.processes import ALONE, Processes
from qplug.machine.stopwatch import Stopwatch
from qplug.registry.registry import Registry


@dataclass(frozen=True, eq=False)
class Session:
    """The surroundings of one command. The entry point creates it and passes it to every step.

    ``registry`` has the plugins. Tensors are computed on ``device``. ``processes`` share the work.
    ``clock`` measures the time and memory of each stage. ``trust_remote_code`` allows qplug to run
    Python code that comes with a model. ``memory``: the bytes that a block of a calibrated run may
    take on ``device``, None for those that are free.
    """

    registry: Registry
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    trust_remote_code: bool = False
    processes: Processes = ALONE
    clock: Stopwatch = field(default_factory=Stopwatch)
    memory: int | None = None

    @classmethod
    def alone(
        cls,
        device: str = "cpu",
        *,
        registry: Registry | None = None,
        trust_remote_code: bool = False,
    ) -> Session:
        """Returns the session of a process that works alone.

        Without ``registry`` it has all installed plugins. Raises QplugError if ``device`` cannot be
        used.
        """
        usable = find_device(device)
        return cls(
            registry or Registry.installed(), usable, trust_remote_code, clock=Stopwatch(usable)
        )

    @classmethod
    @contextmanager
    def joined(
        cls,
        device: str,
        *,
        registry: Registry | None = None,
        trust_remote_code: bool = False,
        memory: int | None = None,
    ) -> Iterator[Session]:
        """A context with the session of this process, joined to those that torchrun started.

        Without ``registry`` it has all installed plugins. Raises QplugError if ``device`` cannot be
        used, and, when the context ends, if another process failed.
        """
        launch = Launch.of()
        usable = find_device(device, launch)
        plugins = registry or Registry.installed()
        with join(launch, usable) as processes:
            yield cls(plugins, usable, trust_remote_code, processes, Stopwatch(usable), memory)
