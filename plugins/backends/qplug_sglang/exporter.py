"""The sglang backend writes folders for SGLang's loader and kernels."""

from __future__ import annotations

from qplug import Exporter, Target
from qplug_compressed_tensors.format import CompressedTensors
from qplug_sglang.engine import SGLang
from qplug_sglang.format import SGLangFormat
from qplug_sglang.members import WRITTEN


class SGLangExporter(Exporter[Target]):
    """Writes folders that SGLang serves, and vLLM too. NVFP4 is stored in ModelOpt's format.

    So is NVFP4A16 for releases that load it there alone.
    """

    name = "sglang"
    Params = Target
    format = SGLangFormat(CompressedTensors(SGLang().loader.plain))
    engine: SGLang = SGLang()

    def __init__(self, params: Target) -> None:
        """Reads folders as the loader of the version in ``params`` does."""
        super().__init__(params)
        own = WRITTEN[self.engine.release]
        self.format = SGLangFormat(CompressedTensors(self.engine.loader.plain), own)
