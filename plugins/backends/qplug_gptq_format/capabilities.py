"""The kernels that run GPTQ folders, by engine release and device: a table, without logic."""

from __future__ import annotations

from qplug import Capability

_SM90, _OTHERS, _ALL = ("sm90",), ("sm80", "sm89", "sm100"), ("sm80", "sm89", "sm90", "sm100")
_CPU = ("cpu",)
_GROUPS = (32, 64, 128, -1)
_H100 = "run on H100, 2026-11-25, groups of 128"
_ON_CPU = "run on a CPU with AVX512, 2026-11-22"
_READ = "not run; read in the source of 0.32"
_READ_0_33 = "not run; read from the source of 0.33.0"
_READ_0_5_23 = "not run; read from the source of 0.5.23"
_BUILT = "not run; by what the kernel is built for"
_ONLY_4_BITS = "the CPU's kernel takes weights of 4 bits alone"
_NO_ASYM_VLLM = "vLLM refuses asymmetric GPTQ: use --backend awq"
_NO_GPTQ_ASYM = "SGLang runs GPTQ by gptq_marlin alone, without zero points: use --backend awq"
_NO_ASYM_SGLANG = "asymmetric GPTQ has no kernel for bfloat16: use --backend awq"
_NO_CPU = "SGLang asks CUDA for the device while it loads a quantized model"

# Columns: scheme, kernel or why there is none, served, groups, out and in multiples, evidence,
# devices. A folder is for both engines, so the multiples are SGLang's: SGLang does not pad.
RELEASES = {
    "vLLM 0.33.0": (
        Capability("W4A16", "Machete or Humming", True, _GROUPS, 64, 128, _READ_0_33, _SM90),
        Capability("W4A16", "Marlin", True, _GROUPS, 64, 128, _READ_0_33, _OTHERS),
        Capability("W4A16_ASYM", _NO_ASYM_VLLM, False, (), 1, 1, _READ_0_33, _ALL),
        Capability("W8A16", "Machete or Humming", True, _GROUPS, 64, 128, _READ_0_33, _SM90),
        Capability("W8A16", "Marlin", True, _GROUPS, 64, 128, _READ_0_33, _OTHERS),
    ),
    "vLLM 0.32.0": (
        Capability("W4A16", "int4 of the CPU", True, _GROUPS, 64, 128, _ON_CPU, _CPU),
        Capability("W4A16_ASYM", _NO_ASYM_VLLM, False, (), 1, 1, _ON_CPU, _CPU),
        Capability("W8A16", _ONLY_4_BITS, False, (), 1, 1, _ON_CPU, _CPU),
    ),
    "vLLM 0.26.0": (
        Capability("W4A16", "Machete or Marlin", True, _GROUPS, 64, 128, _H100, _SM90),
        Capability("W4A16", "Marlin", True, _GROUPS, 64, 128, _READ, _OTHERS),
        Capability("W4A16_ASYM", _NO_ASYM_VLLM, False, (), 1, 1, _READ, _ALL),
        Capability("W8A16", "Machete or Marlin", True, _GROUPS, 64, 128, _H100, _SM90),
        Capability("W8A16", "Marlin", True, _GROUPS, 64, 128, _READ, _OTHERS),
    ),
    "SGLang 0.5.23": (
        Capability("W4A16", "Marlin", True, _GROUPS, 64, 128, _READ_0_5_23, _ALL),
        Capability("W4A16", _NO_CPU, False, (), 1, 1, _READ_0_5_23, _CPU),
        Capability("W4A16_ASYM", _NO_GPTQ_ASYM, False, (), 1, 1, _READ_0_5_23, _ALL),
        Capability("W8A16", "Marlin", True, _GROUPS, 64, 128, _READ_0_5_23, _ALL),
        Capability("W8A16", _NO_CPU, False, (), 1, 1, _READ_0_5_23, _CPU),
    ),
    "SGLang 0.5.16": (
        Capability("W4A16", "Marlin", True, _GROUPS, 64, 128, _H100, _SM90),
        Capability("W4A16", "Marlin", True, _GROUPS, 64, 128, _BUILT, _OTHERS),
        Capability("W4A16", _NO_CPU, False, (), 1, 1, _ON_CPU, _CPU),
        Capability("W4A16_ASYM", _NO_ASYM_SGLANG, False, (), 1, 1, _BUILT, _ALL),
        Capability("W8A16", "Marlin", True, _GROUPS, 64, 128, _H100, _SM90),
        Capability("W8A16", "Marlin", True, _GROUPS, 64, 128, _BUILT, _OTHERS),
        Capability("W8A16", _NO_CPU, False, (), 1, 1, _ON_CPU, _CPU),
    ),
}
