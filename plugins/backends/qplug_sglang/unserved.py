"""Schemes that SGLang loads in no release: rows of its table, without logic."""

from __future__ import annotations

from qplug import Capability

_EVERYWHERE = ("sm80", "sm89", "sm90", "sm100", "cpu")
_READ = "not run; read from the source of 0.5.23"

_FOUR_OR_EIGHT = "SGLang has integers of 4 and 8 bits alone"
_NO_ZERO_POINTS = "Marlin has no zero points of 8 bits: use W8A16"
_INT4_FLOATS = "SGLang has int4 weights with float inputs alone: use W4A16"
_NO_BLOCKS = "SGLang has fp8 weights with float inputs by row or tensor alone: use FP8A16"
_NO_MX = "SGLang has no dense layers in MX formats of compressed-tensors"

# Columns: scheme, why there is no kernel, served, groups, out and in multiples, evidence, devices.
ROWS = (
    *(
        Capability(f"W{bits}A16{zeros}", _FOUR_OR_EIGHT, False, (), 1, 1, _READ, _EVERYWHERE)
        for bits in (2, 3, 5, 6, 7)
        for zeros in ("", "_ASYM")
    ),
    Capability("W8A16_ASYM", _NO_ZERO_POINTS, False, (), 1, 1, _READ, _EVERYWHERE),
    Capability("W4A8", _INT4_FLOATS, False, (), 1, 1, _READ, _EVERYWHERE),
    Capability("FP8A16_BLOCK", _NO_BLOCKS, False, (), 1, 1, _READ, _EVERYWHERE),
    Capability("MXFP4", _NO_MX, False, (), 1, 1, _READ, _EVERYWHERE),
    Capability("MXFP4AFP8", _NO_MX, False, (), 1, 1, _READ, _EVERYWHERE),
    Capability("MXFP8", _NO_MX, False, (), 1, 1, _READ, _EVERYWHERE),
)
