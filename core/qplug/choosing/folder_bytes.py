"""The bytes of a folder besides the weights that are chosen, at most, before it is written."""

from __future__ import annotations

from collections.abc import Collection

from qplug.api.tensors import Checkpoint

#: Bytes of a tensor in the header of its file and in the index, besides its name in both.
_TENSOR = 260
#: Tensors that a format stores for a linear, at most.
_TENSORS = 5
#: Bytes of a linear in qplug.json and config.json, besides its name.
_LINEAR = 700
#: config.json, qplug.json, README.md without their layers.
_TEXTS = 24_000


def other_bytes(source: Checkpoint, linears: Collection[str]) -> int:
    """The bytes of all that is in the folder besides the weights of ``linears``, at most.

    ``source`` is the float model.
    """
    weights = {f"{name}.weight" for name in linears}
    copied = [(n, t) for n, t in source.tensors.items() if n not in weights]
    tensors = sum(tensor.nbytes + _TENSOR + 2 * len(name) for name, tensor in copied)
    layers = sum(_LINEAR + 4 * len(n) + _TENSORS * (_TENSOR + 2 * len(n)) for n in linears)
    files = sum(path.stat().st_size for path in source.companions())
    config = source.folder / "config.json"
    return tensors + layers + files + _TEXTS + (config.stat().st_size if config.is_file() else 0)
