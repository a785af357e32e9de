"""The scales of inputs that a run would store, from the largest values in the float model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from qplug.api.scheme import QuantArgs, Scheme
from qplug.calibration.samples import Samples
from qplug.checkpoint.names import local_of
from qplug.choosing.decisions import Decision
from qplug.choosing.float_passes import FloatPasses
from qplug.numerics.activations import input_scale

#: Scales, float32 ``[1]``, by linear and then by how its inputs are rounded.
StaticScales: TypeAlias = Mapping[str, Mapping[QuantArgs, Tensor]]


def static_scales(
    passes: FloatPasses,
    options: Mapping[Decision, Sequence[Scheme | None]],
    batches: Sequence[Samples],
) -> StaticScales:
    """The scales of all static inputs among ``options``; empty if there are none.

    They cover what enters a linear in all of ``batches``, and so no batch has a scale of its own.
    All experts of a layer share a scale, as in a run. A linear that no token reaches has none.
    """
    asked = {
        decision: list(
            dict.fromkeys(
                scheme.activations
                for scheme in schemes
                if scheme is not None and scheme.activations is not None and scheme.static_inputs
            )
        )
        for decision, schemes in options.items()
    }
    names = {name for decision, each in asked.items() if each for name in decision.linears}
    peaks = passes.peaks(batches, names) if names else {}
    scales: dict[str, dict[QuantArgs, Tensor]] = {}
    for decision, each in asked.items():
        shared: dict[str, Tensor] = {}
        for name in decision.linears:
            if name in peaks:
                own, local = peaks[name], local_of(name)
                shared[local] = torch.maximum(shared.get(local, own), own)
        for name in decision.linears:
            peak = shared.get(local_of(name))
            if peak is not None:
                scales[name] = {args: input_scale(peak, args).reshape(1) for args in each}
    return scales


def scale_for(scales: StaticScales, name: str, inputs: QuantArgs) -> Tensor | None:
    """The scale of the linear ``name`` for ``inputs``; None if it is found as the model runs."""
    return scales.get(name, {}).get(inputs)
