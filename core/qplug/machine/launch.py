"""Reads from the environment which of torchrun's processes this one is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

#: The variables that torchrun sets. Schedulers set some of them for single processes too.
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """The place of this process among the processes of a run.

    It is number ``rank``, from 0, of ``count`` in the whole run, and number ``local_rank`` of
    ``local_count`` on this machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> Launch:
        """Returns the place that torchrun set; one process alone if any variable is missing."""
        if not all(environment.get(name) for name in _VARIABLES):
            return cls()
        rank, count, local_rank, local_count = (int(environment[name]) for name in _VARIABLES[:4])
        return cls(rank, count, local_rank, local_count)

    @property
    def is_first(self) -> bool:
        """Whether this process is the first one, which alone writes and prints."""
        return self.rank == 0


#: The launch of a process that was started alone.
ALONE = Launch()
