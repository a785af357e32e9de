"""How far the residual stream of the quantized model is from the float model's after a block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qplug.machine.processes import Processes


class StreamDistance:
    """The mean over tokens of ``||x' - x|| / ||x||``, summed up batch by batch.

    ``x`` are the hidden states of a token after a block of the float model, ``x'`` those of the
    quantized model, whose blocks before are quantized too. Tokens count alike: a few with large
    hidden states, such as the first of a text, do not hide the others.
    """

    def __init__(self, real: Sequence[Tensor | None]) -> None:
        """``real``: for each batch bool ``[samples, tokens]``, false for padding, None if none."""
        self._real = real
        self._sum, self._count = 0.0, 0

    def add(self, index: int, hidden: Tensor, float_hidden: Tensor) -> None:
        """Adds batch ``index``, ``[samples, tokens, width]`` of each model."""
        away = (hidden.float() - float_hidden.float()).norm(dim=-1)
        own = float_hidden.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        relative, real = away / own, self._real[index]
        if real is not None and real.shape == relative.shape:
            relative = relative[real.to(relative.device)]
        self._sum += relative.double().sum().item()
        self._count += relative.numel()

    def shared(self, processes: Processes) -> float:
        """The mean over the tokens of all processes, which must call this together."""
        every = processes.gather((self._sum, self._count))
        return sum(each for each, _ in every) / max(1, sum(count for _, count in every))
