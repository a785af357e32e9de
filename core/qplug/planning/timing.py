"""What was timed of an engine: a model's shape on a GPU, and the tokens a second of each scheme."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qplug.api.gpus import GPUS, GpuModel
from qplug.api.scheme import PRESETS


@dataclass(frozen=True)
class Work:
    """What a model has to read and to multiply under a scheme.

    ``dense`` and ``experts`` are bytes of linears outside and inside of routed experts, ``head``
    those of the head. ``share`` is the share of the experts that a token goes to. ``products`` is
    the number of weights that a token is multiplied with, ``blocks`` the number of decoder blocks.
    """

    dense: float
    experts: float
    head: int
    share: float
    products: float
    blocks: int

    def step(self, requests: int, cache: float) -> float:
        """The bytes of a step that writes a token of each of ``requests``.

        ``cache``: the bytes of the cache of all requests. Each token chooses its experts, so that
        ``1 - (1 - share) ** requests`` of them are read.
        """
        chosen = 1 - (1 - self.share) ** requests
        return self.dense + self.head + self.experts * chosen + cache


@dataclass(frozen=True)
class Speed:
    """Tokens a second: ``writing`` by the number of requests at a time, and ``reading`` prompts."""

    writing: Mapping[int, float]
    reading: float


@dataclass(frozen=True)
class Timing:
    """The speeds of one model on one GPU.

    ``shape`` names the model, ``gpu`` is a name in ``GPUS``. ``blocks`` is the number of decoder
    blocks that were timed. ``dense`` and ``experts`` are the numbers of weights in their linears
    outside and inside of routed experts, ``head`` that of the head; ``share`` is the share of the
    experts that a token goes to. A token takes ``cache`` bytes in the KV cache, and a request had
    ``tokens`` tokens on average while it was written. ``speeds`` are by the name of the scheme,
    empty for the float model in bfloat16.
    """

    shape: str
    gpu: str
    engine: str
    date: str
    blocks: int
    dense: int
    experts: int
    head: int
    share: float
    cache: int
    tokens: int
    speeds: Mapping[str, Speed]

    @property
    def source(self) -> str:
        """The engine, the GPU, the shape and the date, in words."""
        return f"{self.engine} on one {self.gpu}, {self.shape}'s shape, {self.date}"

    @property
    def model(self) -> GpuModel:
        """The GPU."""
        return GPUS[self.gpu]

    def work(self, scheme: str) -> Work:
        """The work of the model under ``scheme``."""
        bits = 16.0
        if scheme:
            weights = PRESETS[scheme].weights
            scale = 8 if weights.scale_dtype.startswith("float8") else 16
            bits = weights.bits + (scale / weights.group_size if weights.group_size else 0)
        products = self.dense + self.experts * self.share + self.head
        return Work(
            self.dense * bits / 8,
            self.experts * bits / 8,
            2 * self.head,
            self.share,
            products,
            self.blocks,
        )

    def rest(self, scheme: str, requests: int) -> float:
        """The seconds of a block in a step that the time of the bytes does not explain.

        On lines between the numbers of requests that were timed, and on the last line beyond them.
        """
        found = {n: self._rest(scheme, n) for n in sorted(self.speeds[scheme].writing)}
        numbers = list(found)
        if len(numbers) == 1 or requests <= numbers[0]:
            return found[numbers[0]]
        after = next((n for n in numbers if n >= requests), numbers[-1])
        before = numbers[numbers.index(after) - 1]
        slope = (found[after] - found[before]) / (after - before)
        return found[before] + slope * (requests - before)

    def _rest(self, scheme: str, requests: int) -> float:
        seconds = requests / self.speeds[scheme].writing[requests]
        nbytes = self.work(scheme).step(requests, requests * self.tokens * self.cache)
        return (seconds - nbytes / (self.model.bandwidth * 1e9)) / self.blocks
