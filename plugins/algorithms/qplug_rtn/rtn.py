"""Round to nearest: no data, no search, a second a billion weights."""

from __future__ import annotations

from collections.abc import Mapping

from qplug import Algorithm, Block, NoParams, QuantizedWeight
from qplug.numerics import round_to_nearest


class RTN(Algorithm[NoParams]):
    """Round every weight to its nearest code, under scales that cover the range."""

    name = "rtn"

    def quantize(self, block: Block) -> Mapping[str, QuantizedWeight]:
        return {each.name: round_to_nearest(each.weight, each.args) for each in block.linears}
