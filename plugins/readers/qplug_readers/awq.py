"""Checkpoints in the AWQ format, as AutoAWQ, llm-awq's converters and AutoRound write them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from qplug import QplugError, QuantArgs, QuantizedWeight, Reader, Scheme, StoredTensor
from qplug_compressed_tensors.configuration import named_scheme
from qplug_readers.modules import Module, coded, read_modules

if TYPE_CHECKING:
    from torch import Tensor

_FLOATS = ("float16", "bfloat16", "float32")


class AWQReader(Reader):
    """Reads AWQ of 4 bits in version gemm: outputs packed in AWQ's order, with zero points.

    ``X.qweight`` is int32 ``[in, out / 8]``, ``X.qzeros`` ``[groups, out / 8]``, ``X.scales``
    ``[groups, out]``.
    """

    name = "awq"

    def reads(self, config: Mapping[str, Any]) -> bool:
        quantization = self.quantization(config)
        method = quantization.get("quant_method")
        packing = str(quantization.get("packing_format"))
        return method == "awq" or (method == "auto-round" and "awq" in packing)

    def as_float(
        self, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
    ) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        quantization, dtype = self.quantization(config), self.float_dtype(config)
        version = str(quantization.get("version", "gemm")).lower()
        if version != "gemm" or quantization.get("bits", 4) != 4:
            raise QplugError(
                f"qplug reads awq of 4 bits in version gemm, not {quantization.get('bits')} bits "
                f"in version {version}"
            )

        def floats_of(module: Module) -> dict[str, StoredTensor]:
            return {"weight": _weight(module, dtype)} if "qweight" in module.tensors else {}

        return self.without_quantization(config), read_modules(tensors, floats_of, self.name)

    def describe(self, config: Mapping[str, Any]) -> str:
        return f"awq of 4 bits in groups of {self.quantization(config).get('group_size')}"


def _weight(module: Module, dtype: str) -> StoredTensor:
    words = module.need("qweight", ("int32",), of="qweight")
    if len(words.spec.shape) != 2:
        raise module.wrong("qweight", f"is {list(words.spec.shape)}, not a matrix")
    width, out = words.spec.shape[0], 8 * words.spec.shape[1]
    scales = module.need("scales", _FLOATS, of="qweight")
    shape = scales.spec.shape
    if len(shape) != 2 or shape[1] != out or not shape[0] or width % shape[0]:
        raise module.wrong("scales", f"is {list(shape)}, which does not fit qweight")
    groups = shape[0]
    zeros = module.need("qzeros", ("int32",), (groups, out // 8), of="qweight")
    whole = groups == 1
    args = QuantArgs(
        "int4", "channel" if whole else "group", None if whole else width // groups, symmetric=False
    )
    scheme = named_scheme(args, None).with_scale_dtype(scales.spec.dtype)
    parts = {"qweight": words, "qzeros": zeros, "scales": scales}
    return coded((out, width), dtype, parts, scheme, partial(_unpack, scheme))


def _unpack(scheme: Scheme, values: Mapping[str, Tensor]) -> QuantizedWeight:
    from qplug_awq_format.format import AWQ

    return AWQ().unpack(values, scheme)
