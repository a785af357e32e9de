"""What was measured of schemes: how fast they are served, and what they lose. Data, with sources.

The page docs/how-to/choose-a-scheme.md shows both; tests compare them with the files of the
measurements.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Speed:
    """Tokens a second: of one request, of 32 requests together, and of prompts that are read."""

    one: float
    many: float
    prompts: float


#: The number of requests behind ``Speed.many``.
MANY = 32
#: The scheme ``""`` is the float model in bfloat16. From docs/serving_gain.json.
SPEEDS = {
    "": Speed(151.7, 4558.2, 42961),
    "FP8_DYNAMIC": Speed(214.7, 6313.6, 61353),
    "W4A16": Speed(239.9, 6847.9, 39824),
    "W8A8": Speed(225.6, 6414.0, 60938),
}
#: The engine that was timed.
SPEEDS_ENGINE = "vLLM"
SPEEDS_SOURCE = "vLLM 0.26 on one H100, Llama 3 8B's shape, 2026-11-25"
#: The GPU of the measurement; the blocks of Llama 3 8B, the weights of their linears, its head's.
SPEEDS_GPU = "H100"
SPEEDS_BLOCKS = 32
SPEEDS_LINEARS, SPEEDS_HEAD = 6_979_321_856, 128_256 * 4096
#: The bytes of a token in its KV cache, and the mean number of tokens of a request (32 to 160).
SPEEDS_CACHE, SPEEDS_TOKENS = 131_072, 96

#: The schemes that multiply in 8 bits, by the rate of a GPU that the products take.
RATES = {
    "W8A8": "int8",
    "W8A8_STATIC": "int8",
    "FP8": "fp8",
    "FP8_DYNAMIC": "fp8",
    "FP8_BLOCK": "fp8",
}


@dataclass(frozen=True)
class Loss:
    """Perplexity after ``algorithm``, and of the float model, on held-back text.

    ``model`` says on which model; the algorithm is the one that qplug proposes for the scheme.
    """

    algorithm: str
    perplexity: float
    base: float
    model: str

    @property
    def rise(self) -> float:
        """How much the perplexity rises: 0.05 is 5 %."""
        return self.perplexity / self.base - 1


_REF = "ref-19m, a Llama of 18.9 million parameters"
_TWIN = "ref-19m with planted outliers"
_FLOAT = 3.4355
#: From benchmarks/RESULTS.md, 64 windows of 512 tokens of held-back text.
LOSSES = {
    "W4A16": Loss("gptq", 3.5867, _FLOAT, _REF),
    "W4A16_ASYM": Loss("awq", 3.6141, _FLOAT, _REF),
    "W8A16": Loss("rtn", 3.4377, _FLOAT, _REF),
    "W8A8": Loss("smoothquant", 3.4442, _FLOAT, _TWIN),
    "FP8": Loss("rtn", 3.4610, _FLOAT, _REF),
    "FP8_DYNAMIC": Loss("rtn", 3.4593, _FLOAT, _REF),
    "FP8_BLOCK": Loss("rtn", 3.4612, _FLOAT, _REF),
    "NVFP4": Loss("rtn", 3.8467, _FLOAT, _REF),
    "NVFP4A16": Loss("gptq", 3.5559, _FLOAT, _REF),
    "MXFP4A16": Loss("gptq", 3.6257, _FLOAT, _REF),
}
LOSSES_SOURCE = "benchmarks/RESULTS.md"
