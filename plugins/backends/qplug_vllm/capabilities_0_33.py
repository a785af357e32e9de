"""The kernels of vLLM 0.33 for schemes that older tables do not name: a table, without logic."""

from __future__ import annotations

from qplug import Capability

_SM90, _CPU = ("sm90",), ("cpu",)
_ALL, _OTHERS = ("sm80", "sm89", "sm90", "sm100"), ("sm80", "sm89", "sm100")
_GROUPS = (32, 64, 128, -1)
_READ = "not run; read from the source of 0.33.0"

_ONLY_4_BITS = "the CPU's kernel takes weights of 4 bits alone"
_NO_FP4_CPU = "there is no fp4 kernel for CPUs"
_NO_MX_CPU = "there is no MXFP8 kernel for CPUs"
_NO_FP8_SM80 = "sm80 has no fp8, and vLLM picks a kernel that needs it: use MXFP4A16"
_STAY = "inputs stay as they are"
_MXFP4_SM90 = "Humming, inputs are rounded to fp8"

# Columns: scheme, kernel or why there is none, served, groups, out and in multiples, evidence,
# devices. Humming pads to its tiles; codes of 32 columns fill whole words, and so do the zero
# points of 32 rows, which merged matrices and processes cut.
ROWS = (
    *(
        Capability(f"W{bits}A16{zeros}", kernel, served, groups, 32, 32, _READ, devices)
        for bits in (2, 3, 5, 6, 7)
        for zeros in ("", "_ASYM")
        for kernel, served, groups, devices in (
            ("Humming", True, _GROUPS, _ALL),
            (_ONLY_4_BITS, False, (), _CPU),
        )
    ),
    Capability("W8A16_ASYM", "Machete or Humming", True, _GROUPS, 32, 32, _READ, _SM90),
    Capability("W8A16_ASYM", "Humming", True, _GROUPS, 32, 32, _READ, _OTHERS),
    Capability("W8A16_ASYM", _ONLY_4_BITS, False, (), 1, 1, _READ, _CPU),
    Capability("W4A8", f"Machete or Humming, {_STAY}", True, _GROUPS, 32, 32, _READ, _SM90),
    Capability("W4A8", f"Marlin, {_STAY}", True, _GROUPS, 32, 32, _READ, _OTHERS),
    Capability("W4A8", f"int4 of the CPU, {_STAY}", True, _GROUPS, 32, 32, _READ, _CPU),
    Capability("MXFP4", f"Marlin, {_STAY}", True, (), 64, 128, _READ, ("sm80", "sm89")),
    Capability("MXFP4", _MXFP4_SM90, True, (), 64, 128, _READ, _SM90),
    Capability("MXFP4", "FlashInfer fp4", True, (), 64, 128, _READ, ("sm100",)),
    Capability("MXFP4", _NO_FP4_CPU, False, (), 1, 1, _READ, _CPU),
    Capability("MXFP4AFP8", _NO_FP8_SM80, False, (), 1, 1, _READ, ("sm80",)),
    Capability("MXFP4AFP8", "Humming", True, (), 64, 128, _READ, ("sm89", "sm90", "sm100")),
    Capability("MXFP4AFP8", _NO_FP4_CPU, False, (), 1, 1, _READ, _CPU),
    Capability("MXFP8", f"Marlin, {_STAY}", True, (), 64, 128, _READ, ("sm80", "sm89")),
    Capability("MXFP8", f"Humming, {_STAY}", True, (), 64, 128, _READ, _SM90),
    Capability("MXFP8", "FlashInfer MXFP8", True, (), 128, 128, _READ, ("sm100",)),
    Capability("MXFP8", _NO_MX_CPU, False, (), 1, 1, _READ, _CPU),
)
