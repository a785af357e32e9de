"""The fake backend: dequantized weights, to measure what no engine serves."""

from __future__ import annotations

from qplug import Exporter, NoParams
from qplug_fake.format import DequantizedFloat


class Fake(Exporter[NoParams]):
    """A float checkpoint that any loader takes; only its values are those of the codes."""

    name = "fake"
    format = DequantizedFloat()
