"""What backends make of a model: the size under each scheme, the kernel, and who can share it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qplug.api import Exporter
from qplug.api.limits import Target, rows_for
from qplug.api.scheme import PRESETS, Scheme
from qplug.errors import QplugError
from qplug.planning.fleet import Fleet
from qplug.planning.outline import Outline, is_expert
from qplug.registry.registry import Registry

#: The numbers of processes that are tried for tensor parallelism.
PROCESSES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Offer:
    """A scheme as a backend writes it for a GPU.

    ``kernel`` runs it, in the release ``engine``; ``evidence`` says how that is known. ``nbytes``
    are the bytes of the folder's tensors; ``dense`` and ``experts`` are those in linears of blocks,
    outside and inside of routed experts. ``kept`` are linears that stay float since no kernel takes
    them. ``processes`` are the numbers of processes
    among which the engine can divide the model. ``has_server``: whether ``qplug serve`` starts the
    backend's own engine.
    """

    scheme: str
    backend: str
    engine: str
    kernel: str
    emulated: bool
    evidence: str
    nbytes: int
    dense: int
    experts: int
    kept: tuple[str, ...]
    processes: tuple[int, ...]
    has_server: bool = True

    @property
    def was_run(self) -> bool:
        """Whether the kernel was run on such a device."""
        return self.evidence.startswith("run")


@dataclass(frozen=True)
class Refusal:
    """A scheme that a backend does not serve on a GPU, or not for this model, and the reason."""

    scheme: str
    backend: str
    reason: str


def find_offers(
    outline: Outline, fleet: Fleet, registry: Registry, backend: str | None = None
) -> tuple[list[Offer], list[Refusal]]:
    """Returns what backends with an engine serve of the model on ``fleet``, and what they refuse.

    Rows come in the order of schemes, then of backends. Schemes that a backend's table does not
    name for the device are in neither list. ``backend`` names the only one to ask. Raises
    QplugError if there is no such backend.
    """
    offers: list[Offer] = []
    refusals: list[Refusal] = []
    kinds = registry.exporters.without_clashes()
    asked = kinds if backend is None else {backend: registry.exporters[backend]}
    counts = [count for count in PROCESSES if _heads_divide(outline, count)]
    backends = [
        {count: _made(registry, name, fleet, count) for count in counts}
        for name, kind in asked.items()
        if kind.engine is not None and kind.engine.releases
    ]
    for scheme in PRESETS.values():
        for exporters in backends:
            for found in _of_backend(outline, scheme, exporters, fleet):
                if isinstance(found, Offer):
                    offers.append(found)
                else:
                    refusals.append(found)
    return offers, refusals


def _of_backend(
    outline: Outline, scheme: Scheme, exporters: Mapping[int, Exporter[Any]], fleet: Fleet
) -> Iterator[Offer | Refusal]:
    """Yields what a backend makes of ``scheme``; ``exporters`` are by number of processes."""
    exporter = exporters[1]
    backend = exporter.name
    assert exporter.engine is not None
    rows = rows_for(exporter.engine.capabilities(), scheme.name, fleet.device)
    if not rows:
        return
    row = next((row for row in rows if row.served), rows[0])
    try:
        schemes = stored_schemes(outline, scheme, exporter)
    except QplugError as error:
        yield Refusal(scheme.name, backend, str(error))
        return
    narrow = exporter.too_narrow(outline.view, schemes)
    wide = {name: each for name, each in schemes.items() if name not in narrow}
    reason = exporter.refuses(outline.view, wide) if wide else next(iter(narrow.values()))
    if reason is not None:
        yield Refusal(scheme.name, backend, reason)
        return
    shared = tuple(
        count for count, of in exporters.items() if count == 1 or _divides(outline, wide, of)
    )
    yield Offer(
        scheme.name,
        backend,
        row.engine,
        row.kernel,
        row.emulated,
        row.evidence,
        *sizes(outline, wide, exporter),
        tuple(narrow),
        shared,
        exporter.engine.server is not None,
    )


def _made(registry: Registry, backend: str, fleet: Fleet, processes: int) -> Exporter[Any]:
    """Returns the exporter for ``fleet``; without options if it takes no ``Target``."""
    kind = registry.exporters[backend]
    if not issubclass(kind.Params, Target):
        return registry.exporters.make(backend)
    return registry.exporters.make(backend, {"gpu": fleet.device, "tp": processes})


def stored_schemes(outline: Outline, scheme: Scheme, exporter: Exporter[Any]) -> dict[str, Scheme]:
    """Returns the scheme of each linear of ``outline.view`` that a run quantizes, by name.

    Scales have the dtype in which ``exporter`` stores them. Raises QplugError if none is left.
    """
    dtype = exporter.format.scale_dtype(scheme, outline.view.dtype)
    floats = exporter.built_float(outline.view)
    stored = scheme.with_scale_dtype(dtype)
    wanted = outline.view.quantizable - floats.keys()
    if not wanted:
        raise QplugError("every linear layer of the model stays float")
    return {name: stored for name in outline.view.linears if name in wanted}


def sizes(
    outline: Outline, schemes: Mapping[str, Scheme], exporter: Exporter[Any] | None
) -> tuple[int, int, int]:
    """Returns the bytes of all tensors that a run writes, and those of linears in blocks.

    The latter are outside and inside of routed experts. ``schemes`` are by name of linears of
    ``outline.view``; other linears stay float. ``exporter`` is None if all do.
    """
    view = outline.view
    width = 4 if view.dtype == "float32" else 2
    total = dense = experts = 0
    for name, shape in view.linears.items():
        nbytes = own = math.prod(shape) * width
        if name in schemes and exporter is not None:
            layout = exporter.format.layout(shape, schemes[name], view.dtype)
            nbytes = sum(spec.nbytes for spec in layout.values())
        total += outline.counts[name] * (nbytes - own)
        if name != view.head and is_expert(name):
            experts += outline.counts[name] * nbytes
        elif name != view.head:
            dense += outline.counts[name] * nbytes
    return outline.nbytes + total, dense, experts


def _heads_divide(outline: Outline, processes: int) -> bool:
    """Whether engines can divide the heads of attention: of queries, and of keys and values.

    ``QKVParallelLinear`` in vLLM 0.26 and SGLang 0.5.16 wants whole heads of queries for each
    process, and divides or copies whole heads of keys and values.
    """
    queries = outline.config.get("num_attention_heads")
    keys = outline.config.get("num_key_value_heads") or queries
    if not (isinstance(queries, int) and isinstance(keys, int) and queries > 0 and keys > 0):
        return True
    return queries % processes == 0 and (keys % processes == 0 or processes % keys == 0)


def _divides(outline: Outline, schemes: Mapping[str, Scheme], exporter: Exporter[Any]) -> bool:
    """Whether the engine divides all linears in ``schemes`` among the processes of ``exporter``."""
    if exporter.target.tp == 1:
        return False  # the backend has no such option
    narrow = exporter.too_narrow(outline.view, schemes)
    return not narrow and exporter.refuses(outline.view, schemes) is None
