"""The findings on a quantized folder, as plain data that a page shows and tests compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qplug.calibration.ranges import InputRange

#: The number of bins of ``Findings.scales`` between a scale and its double.
BINS_PER_OCTAVE = 4


@dataclass(frozen=True)
class Bytes:
    """The bytes of quantized linears, of the other linears, and of all other tensors."""

    quantized: int
    linears: int
    others: int

    @property
    def total(self) -> int:
        return self.quantized + self.linears + self.others


@dataclass(frozen=True)
class Overview:
    """The facts about a folder in its headers and its qplug.json; no weight is read for them.

    ``schemes`` are the numbers of quantized linears, by scheme. ``recipe`` is as in qplug.json, and
    empty without it. ``weights`` is the number of quantized weights, ``linear_weights`` of the
    weights of all linears, ``parameters`` of all parameters. ``errors`` and ``losses`` are by
    linear, as in ``output.step_report.Report``. ``serve`` is the command that serves the folder,
    None if no engine does. ``experts`` are the numbers of calibration tokens of the experts of each
    layer. ``places`` are the block of each quantized linear, from 0, or None outside the blocks,
    and its kind: its name within the block, the same for all experts. ``identity`` is as in the
    ``output.manifest.Manifest``.
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
    experts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    places: Mapping[str, tuple[int | None, str]] = field(default_factory=dict)
    identity: str = ""

    @property
    def bits_per_weight(self) -> float | None:
        """The bits of a quantized weight, scales and zero points included."""
        return 8 * self.bytes.quantized / self.weights if self.weights else None

    @property
    def bits_per_linear_weight(self) -> float:
        """The mean bits of a weight of any linear, quantized or not."""
        return 8 * (self.bytes.quantized + self.bytes.linears) / self.linear_weights

    @property
    def bits_per_parameter(self) -> float:
        """The mean bits of a parameter, in all tensors."""
        return 8 * self.bytes.total / self.parameters


@dataclass(frozen=True)
class Span:
    """The smallest and the largest of some values."""

    low: float
    high: float


@dataclass(frozen=True)
class Layer:
    """The findings on one quantized linear.

    ``block`` is the number of its block, from 0, None outside the blocks. ``kind`` is its name
    within the block, the same for all experts. ``rewritten`` is True if an algorithm changed the
    float weight before it was quantized. ``error`` is the relative error of the weight in
    qplug.json; ``recomputed`` is the same from the files, None without the float model or if the
    weight is rewritten. ``loss`` is the relative error of the output on calibration data.

    ``weights`` are the spans of the float weight, None if it is not available, and of the
    dequantized weight. ``inputs`` (before and after all transforms) and ``clips`` are as in
    ``output.step_report.Report``. ``scales`` is the span of the ``scale_count`` scales, None if the
    format stores none.
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
    """The findings on a folder and, if ``against`` names it, on its float model.

    ``scales`` are the numbers of scales by ``floor(log2(scale) * BINS_PER_OCTAVE)``.
    ``float_bytes`` are the sizes in the float model. ``calibrated`` is True if the run had
    calibration data, in which case ``clips`` of all layers are known. ``options`` are, by layer
    that stands out, the options of ``qplug quantize`` that store it in more bits, which the backend
    serves. ``algorithm`` is a better algorithm for this scheme than the one of the run, if any.
    """

    overview: Overview
    layers: tuple[Layer, ...]
    scales: Mapping[int, int]
    against: str | None
    float_bytes: Bytes | None
    calibrated: bool = field(default=False)
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    algorithm: str | None = None
