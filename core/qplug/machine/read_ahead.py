"""Reads the files of modules that a run will import, while it still imports others.

An import opens thousands of small files, one after the other, and a disk that has not read them
takes a millisecond or more for each: ten seconds for the code of models. A process of its own asks
for many at a time. (A thread would wait for the interpreter, which the imports keep busy.)
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from qplug.machine.launch import Launch

#: What is imported together.
Part = Literal["torch", "models"]
#: Folders by how they are read: see ``read_files``.
Folders = tuple[tuple[str, tuple[str, ...]], ...]

#: Folders of modules, by how they are read, in the order in which they are imported: with torch,
#: and with the code of models. A package need not be there.
_TORCH: Folders = (
    ("flat", ("torch", "numpy")),
    ("tree", ("numpy/_core", "numpy/lib", "numpy/_typing", "numpy/linalg", "numpy/ma")),
    ("tree", ("torch/_higher_order_ops", "torch/_library", "torch/_native", "torch/_refs")),
    ("tree", ("torch/nn", "torch/utils", "torch/autograd", "torch/cuda", "torch/ao")),
    ("tree", ("torch/_prims", "torch/optim", "torch/distributions", "torch/fx", "torch/jit")),
    ("tree", ("torch/backends", "torch/package", "torch/quantization", "torch/_functorch")),
    ("tree", ("torch/_decomp", "torch/_subclasses", "torch/export", "torch/multiprocessing")),
    ("tree", ("torch/masked", "torch/profiler", "torch/_export", "torch/_logging")),
    ("tree", ("torch/_prims_common", "torch/accelerator", "torch/amp", "torch/cpu")),
    ("tree", ("torch/fft", "torch/func", "torch/futures", "torch/linalg", "torch/mps")),
    ("tree", ("torch/mtia", "torch/nested", "torch/signal", "torch/sparse")),
    ("tree", ("torch/special", "torch/testing", "torch/_vendor", "torch/xpu", "torch/contrib")),
    ("flat", ("torch/distributed", "torch/_inductor", "torch/_dynamo", "torchgen")),
)
_MODELS: Folders = (
    ("flat", ("transformers",)),
    ("tree", ("transformers/utils", "huggingface_hub", "httpx2", "httpcore2", "h11", "anyio")),
    ("tree", ("filelock", "tqdm", "yaml", "regex", "idna", "jinja2", "tokenizers", "truststore")),
    ("text", ("transformers/models",)),
    ("flat", ("transformers/models/auto", "transformers/models")),
    ("tree", ("transformers/integrations", "transformers/distributed", "sympy", "mpmath")),
    ("tree", ("torch/distributed", "torch/_dynamo", "torch/_inductor", "torch/_numpy")),
    ("tree", ("torch/onnx", "transformers/generation", "accelerate", "safetensors", "psutil")),
    ("tree", ("numpy/random", "numpy/polynomial", "numpy/f2py", "numpy/fft", "numpy/testing")),
    ("flat", ("scipy",)),
    ("tree", ("scipy/_lib", "scipy/optimize", "scipy/linalg", "scipy/sparse", "scipy/spatial")),
    ("tree", ("scipy/special", "scipy/fft", "scipy/constants", "transformers/loss")),
    ("tree", ("transformers/quantizers", "PIL", "triton")),
)
_FOLDERS = {"torch": _TORCH, "models": _MODELS}
_PROGRAM = Path(__file__).with_name("read_files.py")


def read_ahead(*parts: Part) -> None:
    """Starts to read the modules of ``parts``, unless that was done or they are imported already.

    The process ends by itself, at once if the system has the modules at hand. Nothing happens if
    it cannot be started: the imports then read their files themselves.
    """
    imported = {"torch": "torch", "models": "transformers.modeling_utils"}
    for part in parts:
        if imported[part] not in sys.modules:
            _start(part)


@cache
def _start(part: Part) -> None:
    folders = [f"{kind}={folder}" for kind, folder in _found(_FOLDERS[part])]
    if not (folders and sys.executable) or Launch.of().local_rank:
        return
    try:
        process = subprocess.Popen(  # noqa: S603 - a program of qplug's own
            [sys.executable, "-I", "-S", str(_PROGRAM), *folders],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        return
    threading.Thread(target=process.wait, name="qplug-read-ahead", daemon=True).start()


def _found(wanted: Folders) -> Iterator[tuple[str, Path]]:
    """Yields the folders ``wanted`` in the packages that are installed, with their kinds."""
    roots: dict[str, Path | None] = {}
    for kind, names in wanted:
        for name in names:
            package, _, inside = name.partition("/")
            if package not in roots:
                spec = find_spec(package)
                roots[package] = Path(spec.origin).parent if spec and spec.origin else None
            root = roots[package]
            if root is not None:
                yield kind, root / inside
