"""How fast schemes are served: written by tools/serving_gain.py, not by hand.

The figures are those of docs/serving_gain.json.
"""

from __future__ import annotations

from qplug.planning.timing import Speed, Timing

TIMINGS = (
    Timing(
        shape="Llama 3 8B",
        gpu="H200",
        engine="vLLM 0.26",
        date="2026-11-28",
        blocks=32,
        dense=6_979_321_856,
        experts=0,
        head=525_336_576,
        share=0.0,
        cache=131_072,
        tokens=96,
        speeds={
            "": Speed({1: 197.6, 32: 5865.8, 256: 25084.4}, 42460),
            "W4A16": Speed({1: 254.6, 32: 7084.4, 256: 24673.3}, 39635),
            "FP8_DYNAMIC": Speed({1: 259.0, 32: 6920.4, 256: 30252.2}, 62204),
            "W8A8": Speed({1: 248.6, 32: 7811.0, 256: 31404.7}, 68028),
            "FP8_BLOCK": Speed({1: 245.6, 32: 5534.7, 256: 28599.2}, 53180),
            "NVFP4A16": Speed({1: 267.7, 32: 7084.9, 256: 16333.3}, 21955),
            "W4AFP8": Speed({1: 216.4, 32: 6128.2, 256: 24135.1}, 64969),
        },
    ),
    Timing(
        shape="Qwen3 30B A3B (12 of its 48 layers)",
        gpu="H200",
        engine="vLLM 0.26",
        date="2026-11-28",
        blocks=12,
        dense=226_492_416,
        experts=7_247_757_312,
        head=311_164_928,
        share=0.0625,
        cache=24_576,
        tokens=96,
        speeds={
            "": Speed({1: 309.3, 32: 6101.3, 256: 37912.7}, 257059),
            "W4A16": Speed({1: 673.7, 32: 11220.1, 256: 28182.4}, 182765),
            "FP8_DYNAMIC": Speed({1: 632.9, 32: 9909.5, 256: 39524.2}, 319174),
            "W8A8": Speed({1: 446.3, 32: 10077.5, 256: 25479.0}, 199506),
            "FP8_BLOCK": Speed({1: 502.1, 32: 10960.4, 256: 39808.2}, 251180),
            "NVFP4A16": Speed({1: 569.4, 32: 11329.3, 256: 34827.9}, 150431),
            "W4AFP8": Speed({1: 425.1, 32: 8875.7, 256: 26823.9}, 321203),
        },
    ),
)
