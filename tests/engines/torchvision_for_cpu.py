"""Lets PyPI's torchvision be imported beside a torch for CPUs.

vLLM imports the processors of models with pictures, and these torchvision. PyPI has builds of it
for CUDA only, whose library with operators does not load; it then declares how two operators of
that library behave, which fails for want of them. None of them is called for the text part.
``install_vllm.py`` puts torchvision into a folder of its own, which is on no path by itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER = Path(sys.prefix) / "torchvision"
_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def make_importable() -> None:
    """Put torchvision on the path, if it is installed, with the operators that it declares."""
    if not FOLDER.exists():
        return
    import torch

    sys.path.append(str(FOLDER))
    library = torch.library.Library("torchvision", "DEF")
    for operator in _OPERATORS:
        library.define(operator)
    globals()["_library"] = library  # it takes its operators with it when it goes
    import torchvision  # noqa: F401 - fails here, and not in the load of a model
