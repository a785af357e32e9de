"""How fast schemes are served: written by tools/serving_gain.py, not by hand.

The figures are those of docs/serving_gain.json.
"""

from __future__ import annotations

from qplug.planning.timing import Speed, Timing

TIMINGS = (
    Timing(
        shape="Llama 3 8B",
        gpu="H100",
        engine="vLLM 0.26",
        date="2026-11-25",
        blocks=32,
        dense=6_979_321_856,
        experts=0,
        head=525_336_576,
        share=0.0,
        cache=131_072,
        tokens=96,
        speeds={
            "": Speed({1: 151.7, 32: 4558.2}, 42961),
            "W4A16": Speed({1: 239.9, 32: 6847.9}, 39824),
            "FP8_DYNAMIC": Speed({1: 214.7, 32: 6313.6}, 61353),
            "W8A8": Speed({1: 225.6, 32: 6414.0}, 60938),
        },
    ),
)
