"""The fake backend writes dequantized weights, to measure schemes that no engine serves."""

from __future__ import annotations

from qplug import Exporter, NoParams
from qplug_fake.format import DequantizedFloat


class Fake(Exporter[NoParams]):
    """Writes a float checkpoint with the values of the codes, which any loader takes."""

    name = "fake"
    format = DequantizedFloat()
