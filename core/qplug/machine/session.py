"""What a command works with, whatever it is asked to do: plugins, a device, processes, a clock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from qplug.machine.devices import find_device
from qplug.machine.launch import Launch
from qplug.machine.processes import ALONE, Processes, join
from qplug.machine.stopwatch import Stopwatch
from qplug.registry.registry import Registry


@dataclass(frozen=True, eq=False)
class Session:
    """The surroundings of one piece of work, made at the door and handed on as a whole.

    ``registry`` has the plugins. Tensors are computed on ``device``. ``processes`` share the work.
    ``clock`` counts what each stage costs. ``trust_remote_code`` allows Python code that a model
    brings to run.
    """

    registry: Registry
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    trust_remote_code: bool = False
    processes: Processes = ALONE
    clock: Stopwatch = field(default_factory=Stopwatch)

    @classmethod
    def alone(
        cls,
        device: str = "cpu",
        *,
        registry: Registry | None = None,
        trust_remote_code: bool = False,
    ) -> Session:
        """The session of one process; without ``registry``, of all plugins that are installed.

        Raises QplugError if there is no such device.
        """
        found = find_device(device)
        return cls(
            registry or Registry.installed(), found, trust_remote_code, clock=Stopwatch(found)
        )

    @classmethod
    @contextmanager
    def joined(
        cls,
        device: str,
        *,
        registry: Registry | None = None,
        trust_remote_code: bool = False,
    ) -> Iterator[Session]:
        """Within it, the session of this process among those that torchrun started with it.

        Raises QplugError as ``alone``; at its end, if another process failed.
        """
        launch = Launch.of()
        found = find_device(device, launch)
        plugins = registry or Registry.installed()
        with join(launch, found) as processes:
            yield cls(plugins, found, trust_remote_code, processes, Stopwatch(found))
