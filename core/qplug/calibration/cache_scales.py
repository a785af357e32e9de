"""The scales of keys and values in the KV cache, from the calibration tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING

from qplug.calibration.block_modules import BlockModules
from qplug.errors import QplugError
from qplug.machine.processes import Processes
from qplug.model.block_call import BlockCall
from qplug.model.kv_cache import SCALES, STORED_SCALES, KVCache, ObservedCache, RoundedCache
from qplug.model.queries import RoundedQueries

if TYPE_CHECKING:
    from torch import Tensor

#: A call of a block, and a mask of real tokens (None: all are real).
CalledBatch = tuple[BlockCall, "Tensor | None"]


def find_cache_scales(
    cache: KVCache,
    blocks: BlockModules,
    block: str,
    effective: Mapping[str, Tensor],
    batches: Iterable[CalledBatch],
    processes: Processes,
) -> dict[str, Tensor]:
    """The scales of keys and values of ``block``, by name within the block, as ``cache`` has them.

    They cover the keys and values (and queries, if each head has a scale) that the quantized block
    computes from ``batches`` with the parameters ``effective``. Raises QplugError if these are not
    finite, if the block fills the cache more than once, or if its queries are not seen.
    """
    by_head = cache.heads is not None
    observer, count = ObservedCache(by_head=by_head), 0
    parameters = blocks.parameters_of(block, effective)
    with (
        blocks.rounding_inputs(block, blocks.parameters[block], effective),
        observer.with_queries() if by_head else nullcontext(),
    ):
        compute = blocks.computing(block, parameters)
        for call, real in batches:
            observer.real = real
            call = call.apart().with_argument(cache.argument, observer)
            compute(call)
            count += 1
    if observer.times != count:
        raise QplugError(
            f"{block}: fills its KV cache several times in a pass, so one scale does not fit it; "
            "leave out --kv-cache"
        )
    attention, specs = cache.modules[block], cache.scales
    if [peak.numel() for peak in observer.peaks] != [spec.shape[0] for spec in specs.values()]:
        raise QplugError(
            f"{block}: qplug cannot see the queries of its attention, which get scales too; take "
            "--kv-cache fp8"
        )
    processes.reduce(most=observer.peaks)
    scales = observer.scales(cache.args, f"{block}.{attention}")
    return {
        f"{attention}.{local}": scale.reshape(spec.shape)
        for (local, spec), scale in zip(specs.items(), scales, strict=True)
    }


def rounded_cache(cache: KVCache, block: str, effective: Mapping[str, Tensor]) -> RoundedCache:
    """A cache that rounds keys and values under the scales of ``block`` in ``effective``."""
    scales = (effective[f"{cache.modules[block]}.{local}"] for local in SCALES)
    return RoundedCache(cache.args, tuple(scales))


def rounded_queries(
    cache: KVCache, block: str, effective: Mapping[str, Tensor]
) -> RoundedQueries | None:
    """How queries of ``block`` are rounded, by ``effective``; None if they have no scale."""
    if cache.heads is None:
        return None
    scale = effective[f"{cache.modules[block]}.{STORED_SCALES[-1]}"]
    return RoundedQueries(cache.args, scale, cache.heads[0])
