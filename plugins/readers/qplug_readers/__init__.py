"""The plugin of qplug's own readers of quantized checkpoints."""

from __future__ import annotations

from collections.abc import Iterable

from qplug import Reader, hookimpl


@hookimpl
def qplug_readers() -> Iterable[Reader]:
    from qplug_readers.awq import AWQReader
    from qplug_readers.compressed import CompressedTensorsReader
    from qplug_readers.fp8 import FP8Reader
    from qplug_readers.gpt_oss import MXFP4Reader
    from qplug_readers.gptq import GPTQReader
    from qplug_readers.modelopt import ModelOptReader

    return [
        AWQReader(),
        CompressedTensorsReader(),
        FP8Reader(),
        GPTQReader(),
        ModelOptReader(),
        MXFP4Reader(),
    ]
