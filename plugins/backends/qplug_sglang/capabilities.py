"""The kernels of SGLang, by release, scheme and device: a table, without logic."""

from __future__ import annotations

from qplug import Capability
from qplug_sglang.unserved import ROWS

_SM90, _OTHERS, _CPU = ("sm90",), ("sm80", "sm89", "sm100"), ("cpu",)
_ALL = ("sm80", "sm89", "sm90", "sm100")
_TO_SM90, _FROM_SM89 = ("sm80", "sm89", "sm90"), ("sm89", "sm90", "sm100")
_GROUPS = (32, 64, 128, -1)

_H200 = "run on H200, 2026-11-22"
_H200_28 = "run on H200, 2026-11-28"
_H100 = "run on H100, 2026-11-26"
_H100_128 = f"{_H100}, groups of 128"
_H100_ROW = f"{_H100}, groups of 128 and rows"
_H100_ALL = f"{_H100}, groups of 32, 64, 128 and rows"
_READ = "not run; by what the kernel is built for"
_READ_0_5_16 = "not run; read from the source of 0.5.16"
_READ_0_5_23 = "not run; read from the source of 0.5.23"
_ON_CPU = "run on a CPU, 2026-11-22"

_NO_CPU = "SGLang asks CUDA for the device while it loads a quantized model"
_INT8_SM100 = "int8_scaled_mm is for sm75 to sm90: use FP8_DYNAMIC"
_NO_STATIC_INT8 = (
    "SGLang ignores input_scale of int8 and fails while loading; W8A8 finds scales at run time"
)
_TENSOR_ALONE = "SGLang takes fp8 weights with scales of rows for int4: use FP8A16_TENSOR"
_EXPERTS_ALONE = "SGLang has int4 weights with fp8 inputs for experts alone"
_INT4_FP8 = "Cutlass int4 x fp8 of experts alone, inputs are rounded with one scale for all"
_SM90_ALONE = "the int4 and fp8 kernel of Cutlass is for sm90 alone"
_WITH_INPUTS = "fp4 kernels of sm100 take inputs in fp4: use NVFP4"
_GPT_OSS = "SGLang has MXFP4 for the experts of GPT-OSS alone"
_NO_MXFP4 = (
    "SGLang passes over MXFP4 of experts in silence but for Kimi-K3 and DeepSeek-V4, and has no "
    "dense MXFP4"
)
_MARLIN_STAY = "Marlin, inputs stay as they are"
_NVFP4_MARLIN = "Marlin, inputs stay as they are; serve with --fp4-gemm-backend marlin"

# Columns: scheme, kernel or why there is none, served, groups, out and in multiples, evidence,
# devices. SGLang does not pad: a shape outside Marlin's tiles passes its checks, and fails later.
SGLANG_0_5_16 = (
    Capability("W4A16", "Marlin", True, _GROUPS, 64, 128, _H100_ALL, _SM90),
    Capability("W4A16", "Marlin", True, _GROUPS, 64, 128, _READ, _OTHERS),
    Capability("W4A16", _NO_CPU, False, (), 1, 1, _ON_CPU, _CPU),
    Capability("W4A16_ASYM", "Marlin", True, _GROUPS, 64, 128, _H100_128, _SM90),
    Capability("W4A16_ASYM", "Marlin", True, _GROUPS, 64, 128, _READ, _OTHERS),
    Capability("W4A16_ASYM", _NO_CPU, False, (), 1, 1, _ON_CPU, _CPU),
    Capability("W8A16", "Marlin", True, _GROUPS, 64, 128, _H100_ROW, _SM90),
    Capability("W8A16", "Marlin", True, _GROUPS, 64, 128, _READ, _OTHERS),
    Capability("W8A16", _NO_CPU, False, (), 1, 1, _ON_CPU, _CPU),
    Capability("W8A8", "int8_scaled_mm", True, (), 8, 16, _H100, _SM90),
    Capability("W8A8", "int8_scaled_mm", True, (), 8, 16, _READ, ("sm80", "sm89")),
    Capability("W8A8", _INT8_SM100, False, (), 1, 1, _READ, ("sm100",)),
    Capability("W8A8", _NO_CPU, False, (), 1, 1, _ON_CPU, _CPU),
    Capability("W8A8_STATIC", _NO_STATIC_INT8, False, (), 1, 1, _H200, _SM90),
    Capability("W8A8_STATIC", _NO_STATIC_INT8, False, (), 1, 1, _READ, _OTHERS),
    Capability("W8A8_STATIC", _NO_CPU, False, (), 1, 1, _ON_CPU, _CPU),
    Capability("FP8", "fp8_scaled_mm", True, (), 16, 16, _H100, _SM90),
    Capability("FP8", "fp8_scaled_mm", True, (), 16, 16, _READ, ("sm89", "sm100")),
    Capability("FP8", _NO_CPU, False, (), 1, 1, _ON_CPU, _CPU),
    Capability("FP8_DYNAMIC", "fp8_scaled_mm", True, (), 16, 16, _H100, _SM90),
    Capability("FP8_DYNAMIC", "fp8_scaled_mm", True, (), 16, 16, _READ, ("sm89", "sm100")),
    Capability("FP8_DYNAMIC", _NO_CPU, False, (), 1, 1, _ON_CPU, _CPU),
    Capability("FP8_BLOCK", "Triton fp8", True, (), 128, 128, _H100, _SM90),
    Capability("FP8_BLOCK", "Triton fp8", True, (), 128, 128, _READ, ("sm89", "sm100")),
    Capability("FP8_BLOCK", _NO_CPU, False, (), 1, 1, _ON_CPU, _CPU),
    Capability("FP8A16", _TENSOR_ALONE, False, (), 1, 1, _READ_0_5_16, _ALL),
    Capability("FP8A16", _NO_CPU, False, (), 1, 1, _READ_0_5_16, _CPU),
    Capability("FP8A16_TENSOR", "Marlin", True, (), 64, 128, _H200_28, _SM90),
    Capability("FP8A16_TENSOR", "Marlin", True, (), 64, 128, _READ_0_5_16, _OTHERS),
    Capability("FP8A16_TENSOR", _NO_CPU, False, (), 1, 1, _READ_0_5_16, _CPU),
    Capability("W4AFP8", _EXPERTS_ALONE, False, (), 1, 1, _H200, _SM90),
    Capability("W4AFP8", _EXPERTS_ALONE, False, (), 1, 1, _READ, _OTHERS),
    Capability("W4AFP8", _NO_CPU, False, (), 1, 1, _ON_CPU, _CPU),
    Capability("NVFP4A16", "Marlin", True, (), 64, 128, _H200_28, _SM90),
    Capability("NVFP4A16", "Marlin", True, (), 64, 128, _READ_0_5_16, ("sm80", "sm89")),
    Capability("NVFP4A16", _WITH_INPUTS, False, (), 1, 1, _READ_0_5_16, ("sm100",)),
    Capability("NVFP4A16", _NO_CPU, False, (), 1, 1, _ON_CPU, _CPU),
    Capability("NVFP4", _NVFP4_MARLIN, True, (), 64, 128, _H100, _SM90),
    Capability("NVFP4", "Cutlass or FlashInfer fp4", True, (), 64, 128, _READ, ("sm100",)),
    Capability("NVFP4", _NO_CPU, False, (), 1, 1, _ON_CPU, _CPU),
    Capability("MXFP4A16", _GPT_OSS, False, (), 1, 1, _READ, _ALL),
    Capability("MXFP4A16", _NO_CPU, False, (), 1, 1, _ON_CPU, _CPU),
)
SGLANG_0_5_23 = (
    Capability("W4A16", "Marlin", True, _GROUPS, 64, 128, _READ_0_5_23, _ALL),
    Capability("W4A16", _NO_CPU, False, (), 1, 1, _READ_0_5_23, _CPU),
    Capability("W4A16_ASYM", "Marlin", True, _GROUPS, 64, 128, _READ_0_5_23, _ALL),
    Capability("W4A16_ASYM", _NO_CPU, False, (), 1, 1, _READ_0_5_23, _CPU),
    Capability("W8A16", "Marlin", True, _GROUPS, 64, 128, _READ_0_5_23, _ALL),
    Capability("W8A16", _NO_CPU, False, (), 1, 1, _READ_0_5_23, _CPU),
    Capability("W8A8", "int8_scaled_mm", True, (), 8, 16, _READ_0_5_23, _TO_SM90),
    Capability("W8A8", _INT8_SM100, False, (), 1, 1, _READ_0_5_23, ("sm100",)),
    Capability("W8A8", _NO_CPU, False, (), 1, 1, _READ_0_5_23, _CPU),
    Capability("W8A8_STATIC", _NO_STATIC_INT8, False, (), 1, 1, _READ_0_5_23, _ALL),
    Capability("W8A8_STATIC", _NO_CPU, False, (), 1, 1, _READ_0_5_23, _CPU),
    Capability("FP8", "fp8_scaled_mm", True, (), 16, 16, _READ_0_5_23, _FROM_SM89),
    Capability("FP8", _MARLIN_STAY, True, (), 64, 128, _READ_0_5_23, ("sm80",)),
    Capability("FP8", _NO_CPU, False, (), 1, 1, _READ_0_5_23, _CPU),
    Capability("FP8_DYNAMIC", "fp8_scaled_mm", True, (), 16, 16, _READ_0_5_23, _FROM_SM89),
    Capability("FP8_DYNAMIC", _MARLIN_STAY, True, (), 64, 128, _READ_0_5_23, ("sm80",)),
    Capability("FP8_DYNAMIC", _NO_CPU, False, (), 1, 1, _READ_0_5_23, _CPU),
    Capability("FP8_BLOCK", "Triton or DeepGEMM fp8", True, (), 128, 128, _READ_0_5_23, _FROM_SM89),
    Capability("FP8_BLOCK", _NO_CPU, False, (), 1, 1, _READ_0_5_23, _CPU),
    Capability("FP8A16", "Marlin", True, (), 64, 128, _READ_0_5_23, _ALL),
    Capability("FP8A16", _NO_CPU, False, (), 1, 1, _READ_0_5_23, _CPU),
    Capability("FP8A16_TENSOR", "Marlin", True, (), 64, 128, _READ_0_5_23, _ALL),
    Capability("FP8A16_TENSOR", _NO_CPU, False, (), 1, 1, _READ_0_5_23, _CPU),
    Capability("W4AFP8", _INT4_FP8, True, (128,), 128, 128, _READ_0_5_23, _SM90),
    Capability("W4AFP8", _SM90_ALONE, False, (), 1, 1, _READ_0_5_23, _OTHERS),
    Capability("W4AFP8", _NO_CPU, False, (), 1, 1, _READ_0_5_23, _CPU),
    Capability("NVFP4A16", "Marlin", True, (), 64, 128, _READ_0_5_23, _TO_SM90),
    Capability("NVFP4A16", "FlashInfer bf16 x fp4", True, (), 64, 128, _READ_0_5_23, ("sm100",)),
    Capability("NVFP4A16", _NO_CPU, False, (), 1, 1, _READ_0_5_23, _CPU),
    Capability("NVFP4", _MARLIN_STAY, True, (), 64, 128, _READ_0_5_23, _TO_SM90),
    Capability("NVFP4", "Cutlass or FlashInfer fp4", True, (), 64, 128, _READ_0_5_23, ("sm100",)),
    Capability("NVFP4", _NO_CPU, False, (), 1, 1, _READ_0_5_23, _CPU),
    Capability("MXFP4A16", _NO_MXFP4, False, (), 1, 1, _READ_0_5_23, _ALL),
    Capability("MXFP4A16", _NO_CPU, False, (), 1, 1, _READ_0_5_23, _CPU),
    *ROWS,
)
#: Kernels of ModelOpt's folders alone, which qplug reads and does not write: by the scheme.
IN_MODELOPT = {
    "MXFP8": Capability(
        "MXFP8", "DeepGEMM or FlashInfer MXFP8", True, (), 128, 128, _READ_0_5_23, ("sm100",)
    )
}
RELEASES = {"SGLang 0.5.23": SGLANG_0_5_23, "SGLang 0.5.16": SGLANG_0_5_16}
