"""The kernels of vLLM for weights in fp8 whose inputs stay float: a table, without logic.

``CompressedTensorsConfig._is_fp8_w8a16`` takes scales of rows and tensors. It takes blocks, too,
but ``CompressedTensorsW8A16Fp8`` then asserts that ``is_static_input_scheme`` is False, and without
inputs that are rounded it is None: such a folder was not loaded on a GPU with 0.26.0.
``_POSSIBLE_WFP8A16_KERNELS`` has Humming first on every GPU, and nothing for CPUs. Experts have no
method for it (``CompressedTensorsMoEMethod.get_moe_method``): see ``loaders``.
"""

from __future__ import annotations

from qplug import Capability

_GPUS, _CPU = ("sm80", "sm89", "sm90", "sm100"), ("cpu",)
_NO_CPU = "vLLM has no kernel for CPUs that leaves the inputs of fp8 weights float"
_NO_BLOCKS = "vLLM stops at an assertion that only rounded inputs satisfy: use FP8A16"
_SCHEMES = ("FP8A16", "FP8A16_TENSOR")


def _rows(release: str) -> tuple[Capability, ...]:
    read = f"not run; read from the source of {release}"
    blocks = "run on H200, 2026-11-28" if release == "0.26.0" else read
    return (
        # Humming pads to its tiles.
        *(Capability(scheme, "Humming", True, (), 16, 16, read, _GPUS) for scheme in _SCHEMES),
        Capability("FP8A16_BLOCK", _NO_BLOCKS, False, (), 1, 1, blocks, _GPUS),
    )


FP8_A16_0_26, FP8_A16_0_33 = _rows("0.26.0"), _rows("0.33.0")
FP8_A16_CPU = tuple(
    Capability(scheme, _NO_CPU, False, (), 1, 1, "not run; read from the source of 0.32.0", _CPU)
    for scheme in (*_SCHEMES, "FP8A16_BLOCK")
)
