"""The kernels of vLLM, by release, scheme and device: a table, without logic."""

from __future__ import annotations

from qplug import Capability
from qplug_vllm.capabilities_0_33 import ROWS
from qplug_vllm.capabilities_fp8_a16 import FP8_A16_0_26, FP8_A16_0_33, FP8_A16_CPU

_SM90, _OTHERS = ("sm90",), ("sm80", "sm89", "sm100")
_CPU = ("cpu",)
_GROUPS = (32, 64, 128, -1)

_H100 = "run on H100, 2026-11-26"
_H100_128 = f"{_H100}, groups of 128"
_H100_ROW = f"{_H100}, groups of 128 and rows"
_H100_ALL = f"{_H100}, groups of 32, 64, 128 and rows"
_ON_CPU = "run on a CPU with AVX512, 2026-11-22"
_READ = "not run; read in the source of 0.32"
_READ_0_33 = "not run; read from the source of 0.33.0"

_INT8_SM100 = "Cutlass has no int8 for sm100: use FP8_DYNAMIC"
_ONLY_4_BITS = "the CPU's kernel takes weights of 4 bits alone"
_NO_FP8_OP = "the CPU's build lacks the operation that rounds inputs under a stored scale"
_NO_FP4_CPU = "there is no fp4 kernel for CPUs"
_SM90_ALONE = "the int4 and fp8 kernel of Cutlass is for sm90 alone"
_MARLIN_STAY = "Marlin, inputs stay as they are"
_MACHETE = "Machete or Humming"
_HUMMING_STAY = "Humming, inputs stay as they are"
_MXFP4_SM90 = "Humming, inputs are rounded"  # to fp8, a scale a token
_MXFP4_SM100 = "FlashInfer fp4, inputs are rounded"  # to MXFP4

# Columns: scheme, kernel or why there is none, served, groups, out and in multiples, evidence,
# devices. The CPU's int4 kernel and Cutlass need these multiples; Marlin pads to its tiles.
VLLM_0_32 = (
    Capability("W4A16", "int4 of the CPU", True, _GROUPS, 32, 32, _ON_CPU, _CPU),
    Capability("W4A16_ASYM", "int4 of the CPU", True, _GROUPS, 32, 32, _ON_CPU, _CPU),
    Capability("W8A16", _ONLY_4_BITS, False, (), 1, 1, _ON_CPU, _CPU),
    Capability("W8A8", "oneDNN int8", True, (), 16, 16, _ON_CPU, _CPU),
    Capability("W8A8_STATIC", "oneDNN int8", True, (), 16, 16, _ON_CPU, _CPU),
    Capability("FP8", _NO_FP8_OP, False, (), 1, 1, _ON_CPU, _CPU),
    Capability("FP8_DYNAMIC", "oneDNN fp8", True, (), 16, 16, _ON_CPU, _CPU),
    Capability("FP8_BLOCK", "its CPU kernel needs AMX", False, (), 1, 1, _ON_CPU, _CPU),
    *FP8_A16_CPU,
    Capability("W4AFP8", _SM90_ALONE, False, (), 1, 1, _ON_CPU, _CPU),
    Capability("NVFP4A16", _NO_FP4_CPU, False, (), 1, 1, _ON_CPU, _CPU),
    Capability("NVFP4", _NO_FP4_CPU, False, (), 1, 1, _ON_CPU, _CPU),
    Capability("MXFP4A16", _NO_FP4_CPU, False, (), 1, 1, _ON_CPU, _CPU),
)
VLLM_0_26 = (
    Capability("W4A16", "Machete or Marlin", True, _GROUPS, 32, 32, _H100_ALL, _SM90),
    Capability("W4A16", "Marlin", True, _GROUPS, 32, 32, _READ, _OTHERS),
    Capability("W4A16_ASYM", "Machete or Marlin", True, _GROUPS, 32, 32, _H100_128, _SM90),
    Capability("W4A16_ASYM", "Marlin", True, _GROUPS, 32, 32, _READ, _OTHERS),
    Capability("W8A16", "Machete or Marlin", True, _GROUPS, 32, 32, _H100_ROW, _SM90),
    Capability("W8A16", "Marlin", True, _GROUPS, 32, 32, _READ, _OTHERS),
    Capability("W8A8", "Cutlass int8", True, (), 16, 16, _H100, _SM90),
    Capability("W8A8", "Cutlass int8", True, (), 16, 16, _READ, ("sm80", "sm89")),
    Capability("W8A8", _INT8_SM100, False, (), 1, 1, _READ, ("sm100",)),
    Capability("W8A8_STATIC", "Cutlass int8", True, (), 16, 16, _H100, _SM90),
    Capability("W8A8_STATIC", "Cutlass int8", True, (), 16, 16, _READ, ("sm80", "sm89")),
    Capability("W8A8_STATIC", _INT8_SM100, False, (), 1, 1, _READ, ("sm100",)),
    Capability("FP8", "Cutlass fp8", True, (), 16, 16, _H100, _SM90),
    Capability("FP8", "Cutlass fp8", True, (), 16, 16, _READ, ("sm89", "sm100")),
    Capability("FP8", _MARLIN_STAY, True, (), 16, 16, _READ, ("sm80",)),
    Capability("FP8_DYNAMIC", "Cutlass fp8", True, (), 16, 16, _H100, _SM90),
    Capability("FP8_DYNAMIC", "Cutlass fp8", True, (), 16, 16, _READ, ("sm89", "sm100")),
    Capability("FP8_DYNAMIC", _MARLIN_STAY, True, (), 16, 16, _READ, ("sm80",)),
    Capability("FP8_BLOCK", "Cutlass or Triton fp8", True, (), 128, 128, _H100, _SM90),
    Capability("FP8_BLOCK", "Cutlass or Triton fp8", True, (), 128, 128, _READ, ("sm89", "sm100")),
    Capability("FP8_BLOCK", _MARLIN_STAY, True, (), 128, 128, _READ, ("sm80",)),
    *FP8_A16_0_26,
    Capability("W4AFP8", "Cutlass int4 x fp8", True, (128,), 128, 128, _H100, _SM90),
    Capability("W4AFP8", _SM90_ALONE, False, (), 1, 1, _READ, _OTHERS),
    Capability("NVFP4A16", "Marlin", True, (), 64, 128, _H100, _SM90),
    Capability("NVFP4A16", "Marlin", True, (), 64, 128, _READ, _OTHERS),
    Capability("NVFP4", _MARLIN_STAY, True, (), 64, 128, _H100, _SM90),
    Capability("NVFP4", _MARLIN_STAY, True, (), 64, 128, _READ, ("sm80", "sm89")),
    Capability("NVFP4", "FlashInfer or Cutlass fp4", True, (), 64, 128, _READ, ("sm100",)),
    Capability("MXFP4A16", "Marlin", True, (), 64, 128, _H100, _SM90),
    Capability("MXFP4A16", "Marlin", True, (), 64, 128, _READ, _OTHERS),
)
# On sm90 vLLM prefers Humming to Marlin. The table is of GPUs: vLLM for CPUs is another wheel.
VLLM_0_33 = (
    Capability("W4A16", _MACHETE, True, _GROUPS, 32, 32, _READ_0_33, _SM90),
    Capability("W4A16", "Marlin", True, _GROUPS, 32, 32, _READ_0_33, _OTHERS),
    Capability("W4A16_ASYM", _MACHETE, True, _GROUPS, 32, 32, _READ_0_33, _SM90),
    Capability("W4A16_ASYM", "Marlin", True, _GROUPS, 32, 32, _READ_0_33, _OTHERS),
    Capability("W8A16", _MACHETE, True, _GROUPS, 32, 32, _READ_0_33, _SM90),
    Capability("W8A16", "Marlin", True, _GROUPS, 32, 32, _READ_0_33, _OTHERS),
    Capability("W8A8", "Cutlass int8", True, (), 16, 16, _READ_0_33, ("sm80", "sm89", "sm90")),
    Capability("W8A8", _INT8_SM100, False, (), 1, 1, _READ_0_33, ("sm100",)),
    Capability(
        "W8A8_STATIC", "Cutlass int8", True, (), 16, 16, _READ_0_33, ("sm80", "sm89", "sm90")
    ),
    Capability("W8A8_STATIC", _INT8_SM100, False, (), 1, 1, _READ_0_33, ("sm100",)),
    Capability("FP8", "Cutlass fp8", True, (), 16, 16, _READ_0_33, ("sm89", "sm90")),
    Capability("FP8", "FlashInfer or Cutlass fp8", True, (), 16, 16, _READ_0_33, ("sm100",)),
    Capability("FP8", _HUMMING_STAY, True, (), 16, 16, _READ_0_33, ("sm80",)),
    Capability("FP8_DYNAMIC", "Cutlass fp8", True, (), 16, 16, _READ_0_33, ("sm89", "sm90")),
    Capability(
        "FP8_DYNAMIC", "FlashInfer or Cutlass fp8", True, (), 16, 16, _READ_0_33, ("sm100",)
    ),
    Capability("FP8_DYNAMIC", _HUMMING_STAY, True, (), 16, 16, _READ_0_33, ("sm80",)),
    Capability(
        "FP8_BLOCK", "DeepGEMM or Cutlass fp8", True, (), 128, 128, _READ_0_33, ("sm90", "sm100")
    ),
    Capability("FP8_BLOCK", _MARLIN_STAY, True, (), 128, 128, _READ_0_33, ("sm89",)),
    Capability("FP8_BLOCK", _HUMMING_STAY, True, (), 128, 128, _READ_0_33, ("sm80",)),
    *FP8_A16_0_33,
    Capability("W4AFP8", "Cutlass int4 x fp8", True, (128,), 128, 128, _READ_0_33, _SM90),
    Capability("W4AFP8", _SM90_ALONE, False, (), 1, 1, _READ_0_33, _OTHERS),
    Capability("NVFP4A16", "Humming", True, (), 64, 128, _READ_0_33, _SM90),
    Capability("NVFP4A16", "Marlin", True, (), 64, 128, _READ_0_33, ("sm80", "sm89")),
    Capability("NVFP4A16", "FlashInfer bf16 x fp4", True, (), 64, 128, _READ_0_33, ("sm100",)),
    Capability("NVFP4", _HUMMING_STAY, True, (), 64, 128, _READ_0_33, _SM90),
    Capability("NVFP4", _MARLIN_STAY, True, (), 64, 128, _READ_0_33, ("sm80", "sm89")),
    Capability("NVFP4", "FlashInfer or Cutlass fp4", True, (), 64, 128, _READ_0_33, ("sm100",)),
    Capability("MXFP4A16", _MXFP4_SM90, True, (), 64, 128, _READ_0_33, _SM90),
    Capability("MXFP4A16", "Marlin", True, (), 64, 128, _READ_0_33, ("sm80", "sm89")),
    Capability("MXFP4A16", _MXFP4_SM100, True, (), 64, 128, _READ_0_33, ("sm100",)),
    *ROWS,
)
#: No scheme was run with 0.32 on a GPU: for it the rows of 0.26 hold on GPUs.
RELEASES = {"vLLM 0.33.0": VLLM_0_33, "vLLM 0.32.0": VLLM_0_32, "vLLM 0.26.0": VLLM_0_26}
