"""The kernels that run gpt-oss in MXFP4, by engine release and device: a table, without logic."""

from __future__ import annotations

from qplug import Capability

_GPUS, _CPU = ("sm80", "sm89", "sm90", "sm100"), ("cpu",)
_READ = "not run; read in the source of {}"
_NO_CPU = "there is no fp4 kernel for CPUs"

# Columns: scheme, kernel or why there is none, served, groups, out and in multiples, evidence,
# devices. Both engines pad experts to the tiles of their kernels.
RELEASES = {
    "vLLM 0.32": (
        Capability("MXFP4A16", "Triton or Marlin", True, (), 32, 32, _READ.format("0.32"), _GPUS),
        Capability("MXFP4A16", _NO_CPU, False, (), 1, 1, _READ.format("0.32"), _CPU),
    ),
    "SGLang 0.5.16": (
        Capability("MXFP4A16", "Triton", True, (), 32, 32, _READ.format("0.5.23"), _GPUS),
        Capability("MXFP4A16", _NO_CPU, False, (), 1, 1, _READ.format("0.5.23"), _CPU),
    ),
}
