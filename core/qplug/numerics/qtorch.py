"""Rounding by the package qtorch, as LLMC does it, to compare figures; no engine rounds so.

qtorch rounds ties away from zero, and saturates at the largest value of a format without NaN: 480
for e4m3. It compiles itself on the first import, which takes a minute.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qplug.errors import QplugError

if TYPE_CHECKING:
    from torch import Tensor


def require_qtorch() -> None:
    """Raises QplugError with a remedy if qtorch is not installed or does not compile."""
    try:
        import qtorch.quant  # noqa: F401
    except ImportError as error:
        if error.name in ("qtorch", "qtorch.quant"):
            raise QplugError(
                "use_qtorch needs the package qtorch: pip install 'qplug[qtorch]'"
            ) from error
        raise _unusable(error) from error
    except Exception as error:  # a failing compiler raises anything
        raise _unusable(error) from error


def _unusable(error: Exception) -> QplugError:
    reason = str(error).strip().partition("\n")[0]
    return QplugError(
        f"use_qtorch: qtorch does not load: {type(error).__name__}: {reason}; it compiles itself, "
        "with a C++ compiler and ninja, and nvcc where there is a GPU"
    )


def round_by_qtorch(values: Tensor, exponent: int, mantissa: int) -> Tensor:
    """Float32 ``values`` rounded to ``exponent`` and ``mantissa`` bits, float32."""
    from qtorch.quant import float_quantize

    rounded: Tensor = float_quantize(values, exp=exponent, man=mantissa, rounding="nearest")
    return rounded
