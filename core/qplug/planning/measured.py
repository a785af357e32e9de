"""What was measured of schemes: what they lose, and which multiply in 8 bits. Data, with sources.

The page docs/how-to/choose-a-scheme.md shows both; tests compare them with the files of the
measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

#: The engine that was timed.
SPEEDS_ENGINE = "vLLM"

#: The schemes that multiply in 8 bits, by the rate of a GPU that the products take.
RATES = {
    "W8A8": "int8",
    "W8A8_STATIC": "int8",
    "FP8": "fp8",
    "FP8_DYNAMIC": "fp8",
    "FP8_BLOCK": "fp8",
    "W4AFP8": "fp8",
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
