"""Which of several processes this one is, as torchrun says in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

#: What torchrun sets. Schedulers set some of these for programs that are one process.
_SET = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """This process among those of a run.

    ``rank`` of ``count`` in the whole run; ``local_rank`` of ``local_count`` on this machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> Launch:
        """One process alone, unless everything that torchrun sets is there."""
        if not all(environment.get(name) for name in _SET):
            return cls()
        rank, count, local_rank, local_count = (int(environment[name]) for name in _SET[:4])
        return cls(rank, count, local_rank, local_count)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0


#: A process that was started by itself.
ALONE = Launch()
