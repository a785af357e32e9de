"""The compressed-tensors backend: folders for whatever loads the format."""

from __future__ import annotations

from qplug import Exporter, NoParams
from qplug_compressed_tensors.engine import CompressedTensorsLoader
from qplug_compressed_tensors.format import CompressedTensors


class CompressedTensorsExporter(Exporter[NoParams]):
    """The compressed-tensors format, without the limits of any one engine."""

    name = "compressed-tensors"
    format = CompressedTensors()
    engine = CompressedTensorsLoader()
