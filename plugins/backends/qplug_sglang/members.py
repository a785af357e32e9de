"""The algorithms of ModelOpt's folders, and what loads them: tables, without logic.

vLLM 0.33 has ``LINEAR_ALGOS`` and ``_BLOCK_FP8_MOE_ALGOS`` in modelopt.py, SGLang has
``ModelOptMixedPrecisionConfig.get_quant_method`` in modelopt_quant.py. Neither has ``W4A16_AWQ``,
``W4A8_AWQ`` or ``NVFP4_AWQ`` in mixed folders.
"""

from __future__ import annotations

from collections.abc import Mapping

from qplug import PRESETS, Scheme

NVFP4, NVFP4_A16, FP8 = PRESETS["NVFP4"], PRESETS["NVFP4A16"], PRESETS["FP8"]
FP8_BLOCK, FP8_DYNAMIC, MXFP8 = (PRESETS[name] for name in ("FP8_BLOCK", "FP8_DYNAMIC", "MXFP8"))

#: The ``quant_algo`` of a linear, and what it means. The first of each scheme is the one to write.
ALGORITHMS: Mapping[str, Scheme] = {
    "NVFP4": NVFP4,
    "FP8": FP8,
    "W4A16_NVFP4": NVFP4_A16,
    "FP8_PB_WO": FP8_BLOCK,
    "FP8_BLOCK_SCALES": FP8_BLOCK,
    "MXFP8": MXFP8,
    "FP8_PER_CHANNEL_PER_TOKEN": FP8_DYNAMIC,
}

#: The schemes that a release of SGLang loads in mixed folders. It takes all other codes for float
#: weights, without a word. ``FP8_PER_CHANNEL_PER_TOKEN`` is vLLM's alone.
LOADED: Mapping[str, frozenset[Scheme]] = {
    "SGLang 0.5.23": frozenset({NVFP4, FP8, NVFP4_A16, FP8_BLOCK, MXFP8}),
    "SGLang 0.5.16": frozenset({NVFP4, FP8, NVFP4_A16}),
}

#: The schemes that SGLang loads as ``quant_algo`` of a whole folder: ModelOptFp8Config,
#: ModelOptFp4Config, and Fp8Config for MXFP8 (``_parse_modelopt_quant_config``).
ALONE: Mapping[str, frozenset[Scheme]] = {
    "SGLang 0.5.23": frozenset({NVFP4, FP8, NVFP4_A16, MXFP8}),
    "SGLang 0.5.16": frozenset({NVFP4, FP8}),
}

#: The schemes that make qplug write ModelOpt's format. 0.5.16 has NVFP4 nowhere else; from 0.5.23
#: on NVFP4A16 is stored as compressed-tensors, where it stands beside all schemes.
WRITTEN: Mapping[str, frozenset[Scheme]] = {
    "SGLang 0.5.23": frozenset({NVFP4}),
    "SGLang 0.5.16": frozenset({NVFP4, NVFP4_A16}),
}

#: The architectures for which SGLang looks for ``weight_scale`` where the folder has
#: ``weight_scale_inv``: ``_legacy_load_weights`` of models/llama.py in 0.5.23, and what inherits
#: it. The scales of blocks then stay uninitialized, with a warning at best.
RENAMES_SCALES = frozenset(
    {
        *("IQuestCoderForCausalLM", "InternLM3ForCausalLM", "Llama4ForCausalLM"),
        *("LlamaForCausalLM", "Ministral3ForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM"),
        "TeleFLMForCausalLM",
    }
)
