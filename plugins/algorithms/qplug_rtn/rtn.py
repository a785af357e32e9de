"""Round to nearest: no data, no search, a second a billion weights."""

from __future__ import annotations

from collections.abc import Mapping

from qplug import Algorithm, Block, NoParams, QuantizedWeight
from qplug.numerics import nearest


class RTN(Algorithm[NoParams]):
    """Round every weight to its nearest code, under scales that cover the range."""

    name = "rtn"
    effort = "rounds"

    def quantize(self, block: Block) -> Mapping[str, QuantizedWeight]:
        return {linear.name: nearest(linear) for linear in block.linears}
