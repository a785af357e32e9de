"""What is known of a quantized folder, as plain data: a page is made of it, tests compare it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qplug.calibration.ranges import InputRange

#: Bins of ``Findings.scales`` in one doubling.
BINS_PER_OCTAVE = 4


@dataclass(frozen=True)
class Bytes:
    """Bytes of the linears that are quantized, of those that are not, and of all other tensors."""

    quantized: int
    linears: int
    others: int

    @property
    def total(self) -> int:
        return self.quantized + self.linears + self.others


@dataclass(frozen=True)
class Overview:
    """What a folder's headers and ``qplug.json`` tell. ``recipe`` is empty without the latter.

    ``weights`` counts those that are quantized, ``linear_weights`` all of linears, ``parameters``
    all there are. ``errors`` and ``losses`` are as in ``Report``. ``serve`` is a command.
    """

    folder: str
    model: str | None
    architecture: str
    backend: str | None
    schemes: Mapping[str, int]
    recipe: Mapping[str, Any]
    versions: Mapping[str, str]
    notes: tuple[str, ...]
    bytes: Bytes
    weights: int
    linear_weights: int
    parameters: int
    errors: Mapping[str, float]
    losses: Mapping[str, float]
    serve: str | None

    @property
    def bits_per_weight(self) -> float | None:
        """Bits of a quantized weight, scales and zero points included."""
        return 8 * self.bytes.quantized / self.weights if self.weights else None

    @property
    def bits_per_linear_weight(self) -> float:
        """The same of all linears, quantized or not."""
        return 8 * (self.bytes.quantized + self.bytes.linears) / self.linear_weights

    @property
    def bits_per_parameter(self) -> float:
        """The same of all tensors."""
        return 8 * self.bytes.total / self.parameters


@dataclass(frozen=True)
class Span:
    """The least and the greatest value."""

    low: float
    high: float


@dataclass(frozen=True)
class Layer:
    """A quantized linear. ``block`` counts from 0; ``kind`` is its name within the block.

    Experts are of one kind. ``error`` is as told in ``qplug.json``, ``recomputed`` from the files;
    the latter is None without the float model, or where this holds other weights (``rewritten``).
    ``weights``: what the float model has, and what the codes mean. ``inputs`` and ``clips`` are as
    in ``Report``; ``scales``: the least and the greatest, None if the format stores none.
    """

    name: str
    block: int | None
    kind: str
    shape: tuple[int, int]
    scheme: str
    rewritten: bool
    error: float | None
    recomputed: float | None
    loss: float | None
    weights: tuple[Span | None, Span]
    inputs: tuple[InputRange, InputRange] | None
    clips: tuple[int, ...]
    scales: Span | None
    scale_count: int


@dataclass(frozen=True)
class Findings:
    """All that the files of a folder tell, and its float model where ``against`` names it.

    ``scales`` counts scales by ``floor(log2(scale) * BINS_PER_OCTAVE)``. ``calibrated``: whether
    there were data, and so ``clips`` of every layer.
    """

    overview: Overview
    layers: tuple[Layer, ...]
    scales: Mapping[int, int]
    against: str | None
    float_bytes: Bytes | None
    calibrated: bool = field(default=False)
