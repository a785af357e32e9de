"""The compressed-tensors backend writes folders for every loader of the format."""

from __future__ import annotations

from qplug import Exporter, NoParams
from qplug_compressed_tensors.engine import CompressedTensorsLoader
from qplug_compressed_tensors.format import CompressedTensors


class CompressedTensorsExporter(Exporter[NoParams]):
    """Writes the compressed-tensors format, without the limits of a particular engine."""

    name = "compressed-tensors"
    format = CompressedTensors()
    engine = CompressedTensorsLoader()
