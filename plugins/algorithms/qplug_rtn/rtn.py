"""Round to nearest: no data, no search of codes, seconds a billion weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from qplug import Algorithm, Block, Param, QuantizedWeight
from qplug.numerics import closest, nearest


@dataclass(frozen=True)
class Params:
    search: Annotated[
        bool, Param("Search the scales of NVFP4 and MXFP4 by squared error; else maxima decide.")
    ] = True


class RTN(Algorithm[Params]):
    """Round every weight to its nearest code, under scales that cover the range.

    The scales of four-bit floats are searched: those of least squared error are taken.
    """

    name = "rtn"
    Params = Params
    effort = "rounds"

    def quantize(self, block: Block) -> Mapping[str, QuantizedWeight]:
        rounded = closest if self.params.search else nearest
        return {linear.name: rounded(linear) for linear in block.linears}
