"""Prints the assignment of AutoScheme (auto-round 0.16) as JSON: groups of linears by target.

Runs where auto-round is installed. Arguments: the model, a text file, mean bits (several), a seed:

    python auto_round_assignment.py MODEL calib.txt 4.25,4.5,5 0 > assignment.json

Its search takes time for each candidate, so there are six of the twelve that ``--scheme auto`` of
qplug has. Linears that engines merge share a scheme. The text is cut into documents of 4000
characters, which start at another place for each seed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

#: Bits, size of groups (-1 is a whole row), and whether there are no zero points.
CANDIDATES = (
    (4, -1, True),
    (4, 128, True),
    (4, 32, True),
    (4, 128, False),
    (4, 32, False),
    (8, 128, True),
)


def main(model: str, text: str, targets: str, seed: str) -> None:
    """Print ``{target: {linear: [bits, group size, symmetric]}}``."""
    from auto_round import AutoRound, AutoScheme
    from auto_round.schemes import QuantizationScheme

    words = Path(text).read_text("utf-8")
    words = words[int(seed) * 1000 :]
    documents = [words[start : start + 4000] for start in range(0, len(words) - 4000, 4000)]
    options = [
        QuantizationScheme(bits, size, symmetric, "int") for bits, size, symmetric in CANDIDATES
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.writelines(json.dumps({"text": document}) + "\n" for document in documents)
        file.flush()
        found: dict[str, Any] = {}
        for target in targets.split(","):
            scheme = AutoScheme(
                avg_bits=float(target),
                options=list(options),
                shared_layers=[["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]],
                dataset=file.name,
                device_map="cpu",
            )
            rounder = AutoRound(
                model,
                scheme=scheme,
                iters=0,
                dataset=file.name,
                seed=int(seed),
                device_map="cpu",
                enable_torch_compile=False,
            )
            rounder.quantize()
            found[target] = {
                name: [config["bits"], config["group_size"], config["sym"]]
                for name, config in rounder.layer_config.items()
            }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
