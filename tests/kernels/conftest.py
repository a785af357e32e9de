"""Triton interprets the GPU's kernels here, on tensors of the CPU.

The interpreter computes what a kernel says, in order, one program after the other. It differs from
a GPU in this: ``tl.dot`` multiplies in float32, not in TF32; products and sums are not fused; sums
have another order; any division is rounded to nearest, not ``div_rn`` alone. Whether a kernel
compiles, and how much memory and time it takes, is seen on a GPU only: ``make test-gpu``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_memory import watch


@pytest.fixture(scope="module", autouse=True)
def _interpreting_triton() -> Iterator[None]:
    """Has Triton and the kernels imported anew, so that kernels are interpreted.

    Triton decides it when a function is decorated, its own functions too, and torch has imported it
    before. Tests of other folders see what they would see without these tests.
    """
    before = _modules_with_triton()
    _remove(before)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pytest.importorskip("triton", reason="there is no Triton, which interprets kernels")
            from triton.runtime import interpreter

            patch.setattr(interpreter, "_convert_float", _converting(interpreter))
            patch.setattr(interpreter.InterpreterBuilder, "create_dot", _multiplying(interpreter))
            watch(interpreter, patch)
            yield
    finally:
        _remove(_modules_with_triton())
        sys.modules.update(before)


@pytest.fixture(autouse=True)
def _no_memory_has_values() -> Iterator[None]:
    """What a kernel does not write is NaN: torch fills new tensors if runs have to be alike."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _modules_with_triton() -> dict[str, Any]:
    """The modules of Triton, but for what is compiled of it, and those that have kernels."""
    compiled = "triton._C"
    return {
        name: module
        for name, module in sys.modules.items()
        if (name.partition(".")[0] == "triton" and not name.startswith(compiled))
        or (name.startswith("qplug") and hasattr(module, "triton"))
    }


def _remove(modules: dict[str, Any]) -> None:
    for name in modules:
        del sys.modules[name]


def _converting(interpreter: Any) -> Any:
    """The interpreter's conversions of floats, but from float32 as a GPU and torch do them.

    Its own cuts off what bfloat16 does not hold, and rounds to e4m3 without a carry.
    """
    import triton.language as tl

    own = interpreter._convert_float
    narrow = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}
    as_bits = {tl.bfloat16: torch.uint16, tl.float8e4nv: torch.uint8}

    def convert(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source != tl.float32 or target not in narrow:
            return own(values, source, target, rounding_mode)
        numbers = torch.from_numpy(values.copy())
        return numbers.to(narrow[target]).view(as_bits[target]).numpy()

    return convert


def _multiplying(interpreter: Any) -> Any:
    """The interpreter's ``tl.dot``, which would multiply the bits of bfloat16 as whole numbers."""
    import triton.language as tl

    own = interpreter.InterpreterBuilder.create_dot

    def widened(factor: Any) -> Any:
        if factor.dtype.scalar != tl.bfloat16:
            return factor
        numbers = torch.from_numpy(factor.data.copy()).view(torch.bfloat16)
        return interpreter.TensorHandle(numbers.float().numpy(), tl.float32)

    def dot(self: Any, left: Any, right: Any, *rest: Any) -> Any:
        return own(self, widened(left), widened(right), *rest)

    return dot
