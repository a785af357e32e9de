"""What vLLM's loader of compressed-tensors folders reads, by release: a table, without logic."""

from __future__ import annotations

from qplug_compressed_tensors.configuration import INT_QUANTIZED, PACK_QUANTIZED
from qplug_compressed_tensors.loader import Loader

#: The formats in which a head was run.
_HEADS = frozenset({PACK_QUANTIZED, INT_QUANTIZED})

LOADERS = {
    "vLLM 0.32.0": Loader(
        heads=_HEADS,
        int4_in_bytes=False,  # choose_mp_linear_kernel has int4 on Arm and Intel GPUs alone
        source="compressed_tensors.py and utils.py of 0.32.0, which are the same in 0.33.0",
    ),
    "vLLM 0.26.0": Loader(
        heads=_HEADS,
        classes_first=True,
        source="find_matched_target of 0.26.0 asks for names, then classes, then parts",
    ),
}
