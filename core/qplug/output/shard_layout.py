"""Where each tensor of a plan lies in the shards, and how written shards change with the plan."""

from __future__ import annotations

import os
from collections.abc import Collection
from functools import cached_property
from pathlib import Path

from qplug.api import StoredTensor
from qplug.checkpoint.names import by_module
from qplug.checkpoint.stacked import members
from qplug.checkpoint.tensor_file import FileTensor, lay_out
from qplug.checkpoint.transposed import transposed_tensor
from qplug.output import disk
from qplug.output.plan import Plan

#: The ending of a shard that is written again, until it takes the place of the old one.
NEW = ".new"


class ShardLayout:
    """The headers and sizes of the shards of ``plan`` by path, and ``places`` by stored name."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.plan = plan
        self.places: dict[str, FileTensor] = {}
        self.headers: dict[Path, bytes] = {}
        self.sizes: dict[Path, int] = {}
        for file, specs in plan.shards().items():
            path = folder / file
            self.headers[path], tensors = lay_out(path, specs)
            self.sizes[path] = len(self.headers[path]) + sum(s.nbytes for s in specs.values())
            self.places.update(tensors)

    @cached_property
    def readable(self) -> dict[str, StoredTensor]:
        """All tensors by name, also of experts that are stored together; matrices ``[out, in]``."""
        readable: dict[str, StoredTensor] = dict(self.places)
        for step in self.plan.steps:
            for name, stacked in step.stacks.items():
                readable |= members(self.places[name], name, stacked)
            readable |= {name: transposed_tensor(self.places[name]) for name in step.transposed}
        return readable

    @cached_property
    def by_module(self) -> dict[str, list[str]]:
        """The local names of all tensors, by module."""
        return by_module(self.readable)

    def moved_to(self, other: ShardLayout, written: Collection[str]) -> None:
        """Gives the shards on disk, which have the tensors ``written``, the layout ``other``.

        A shard is written to a new file that then takes the place of the old one.
        """
        for path, header in self.headers.items():
            if other.headers[path] == header or not path.exists():
                continue
            new = path.with_name(path.name + NEW)
            disk.remove(new)
            file = disk.open_own(new, os.O_EXCL)
            try:
                disk.write_at(file, other.headers[path], 0)
                for name in written:
                    if self.places[name].path == path:
                        offset = other.places[name].start
                        for piece in self.places[name].chunks():
                            offset = disk.write_at(file, piece, offset)
                os.fsync(file)
            finally:
                os.close(file)
            new.replace(path)
            disk.sync_folder(path.parent)
