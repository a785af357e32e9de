"""The sglang backend: folders within what SGLang's loader and kernels take."""

from __future__ import annotations

from qplug import Exporter, Target
from qplug_sglang.engine import SGLang
from qplug_sglang.format import SGLangFormat


class SGLangExporter(Exporter[Target]):
    """Folders that SGLang serves, and vLLM too. NVFP4 is stored as ModelOpt does."""

    name = "sglang"
    Params = Target
    format = SGLangFormat()
    engine = SGLang()
