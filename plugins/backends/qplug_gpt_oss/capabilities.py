"""The kernels that run gpt-oss in MXFP4, by engine release and device: a table, without logic."""

from __future__ import annotations

from qplug import Capability

_SM90, _OTHERS, _CPU = ("sm90",), ("sm80", "sm89", "sm100"), ("cpu",)
_GPUS, _NOT_SM100 = ("sm80", "sm89", "sm90", "sm100"), ("sm80", "sm89", "sm90")
_H200 = "run on H200, 2026-11-27"
_READ = "not run; read from the source of {}"
_READ_0_33, _READ_0_32 = _READ.format("0.33.0"), _READ.format("0.32.0")
_READ_0_5_23 = _READ.format("0.5.23")
_BUILT = "not run; by what the kernel is built for"
_NO_CPU = "there is no fp4 kernel for CPUs"

# Columns: scheme, kernel or why there is none, served, groups, out and in multiples, evidence,
# devices. Both engines pad experts to the tiles of their kernels.
RELEASES = {
    "vLLM 0.33.0": (
        Capability(
            "MXFP4A16", "Triton, Humming or Marlin", True, (), 32, 32, _READ_0_33, _NOT_SM100
        ),
        Capability("MXFP4A16", "FlashInfer or Triton", True, (), 32, 32, _READ_0_33, ("sm100",)),
    ),
    "vLLM 0.32.0": (
        Capability("MXFP4A16", "Triton or Marlin", True, (), 32, 32, _READ_0_32, _GPUS),
        Capability("MXFP4A16", _NO_CPU, False, (), 1, 1, _READ_0_32, _CPU),
    ),
    "vLLM 0.26.0": (Capability("MXFP4A16", "Triton or Marlin", True, (), 32, 32, _H200, _SM90),),
    "SGLang 0.5.23": (
        Capability("MXFP4A16", "Triton", True, (), 32, 32, _READ_0_5_23, _GPUS),
        Capability("MXFP4A16", _NO_CPU, False, (), 1, 1, _READ_0_5_23, _CPU),
    ),
    "SGLang 0.5.16": (
        Capability("MXFP4A16", "Triton", True, (), 32, 32, _H200, _SM90),
        Capability("MXFP4A16", "Triton", True, (), 32, 32, _BUILT, _OTHERS),
        Capability("MXFP4A16", _NO_CPU, False, (), 1, 1, _BUILT, _CPU),
    ),
}
