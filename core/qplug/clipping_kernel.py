"""``clip_errors`` in one pass over the weights: each is read once, whatever the candidates."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qplug.scheme import QuantArgs

_ROWS = 64


# Triton reads annotations itself and takes no others than its own.
@triton.jit
def _clip_errors(  # type: ignore[no-untyped-def]
    weight,
    blocks,
    scales,
    zeros,
    errors,
    rows,
    width,
    groups,
    candidates,
    low,
    high,
    HAS_ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program has ``ROWS`` rows of one group, and the group's block of the Gram matrix."""
    group = tl.program_id(1)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < rows
    column = tl.arange(0, GROUP)
    place = row[:, None] * width + group * GROUP + column[None, :]
    values = tl.load(weight + place, mask=inside[:, None], other=0.0)
    gram = tl.load(blocks + (group * GROUP + column[:, None]) * GROUP + column[None, :])
    for candidate in range(candidates):
        here = (candidate * rows + row) * groups + group
        scale = tl.load(scales + here, mask=inside, other=1.0)[:, None]
        # Ties to even, as torch rounds: see the kernel of GPTQ.
        ratio = tl.math.div_rn(values, tl.broadcast_to(scale, (ROWS, GROUP)))
        ratio = tl.minimum(tl.maximum(ratio, -4194304.0), 4194304.0)
        code = (ratio + 12582912.0) - 12582912.0
        if HAS_ZERO:
            zero = tl.load(zeros + here, mask=inside, other=0).to(tl.float32)[:, None]
            code = tl.minimum(tl.maximum(code + zero, low), high) - zero
        else:
            code = tl.minimum(tl.maximum(code, low), high)
        difference = code * scale - values
        product = tl.dot(difference, gram, input_precision="tf32")
        tl.store(errors + here, tl.sum(product * difference, axis=1), mask=inside)


def clip_errors_on_gpu(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, blocks: Tensor, args: QuantArgs
) -> Tensor:
    """``clipping.clip_errors`` as one kernel, its products in TF32."""
    rows, width = weight.shape
    errors = torch.empty(scales.shape, device=weight.device)
    low, high = args.code_range
    _clip_errors[(triton.cdiv(rows, _ROWS), len(blocks))](
        weight.contiguous(),
        blocks,
        scales,
        scales if zeros is None else zeros,
        errors,
        rows,
        width,
        len(blocks),
        len(scales),
        float(low),
        float(high),
        HAS_ZERO=zeros is not None,
        GROUP=blocks.shape[1],
        ROWS=_ROWS,
        num_warps=4,
    )
    return errors
