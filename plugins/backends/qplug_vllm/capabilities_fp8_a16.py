"""The kernels of vLLM for weights in fp8 whose inputs stay float: a table, without logic.

``CompressedTensorsConfig._is_fp8_w8a16`` takes scales of rows, tensors and blocks, and
``_POSSIBLE_WFP8A16_KERNELS`` has Humming first on every GPU, and nothing for CPUs. Experts have no
method for it (``CompressedTensorsMoEMethod.get_moe_method``): see ``loaders``.
"""

from __future__ import annotations

from qplug import Capability

_GPUS, _CPU = ("sm80", "sm89", "sm90", "sm100"), ("cpu",)
_NO_CPU = "vLLM has no kernel for CPUs that leaves the inputs of fp8 weights float"
#: Scheme and multiples: Humming pads to its tiles, blocks are cut nowhere.
_SHAPES = (("FP8A16", 16), ("FP8A16_TENSOR", 16), ("FP8A16_BLOCK", 128))


def _rows(release: str) -> tuple[Capability, ...]:
    read = f"not run; read from the source of {release}"
    return tuple(
        Capability(scheme, "Humming", True, (), multiple, multiple, read, _GPUS)
        for scheme, multiple in _SHAPES
    )


FP8_A16_0_26, FP8_A16_0_33 = _rows("0.26.0"), _rows("0.33.0")
FP8_A16_CPU = tuple(
    Capability(scheme, _NO_CPU, False, (), 1, 1, "not run; read from the source of 0.32.0", _CPU)
    for scheme, _ in _SHAPES
)
