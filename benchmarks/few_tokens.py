"""Errors of experts on tokens that they have not seen, with and without statistics of the layer.

    python benchmarks/few_tokens.py MODEL CALIBRATION FRESH [--samples 128] [--seed 0]

CALIBRATION and FRESH are text files. The model stays float: experts of all blocks see the same
tokens whatever the prior. Prints the mean of ``||XW'ᵀ - XWᵀ||² / ||XWᵀ||²`` over FRESH, in percent,
for the linears of experts with so many tokens, and the sums over all experts.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from contextlib import closing
from pathlib import Path

from qplug import preset
from qplug.calibration.samples import Samples
from qplug.calibration.tokens import calibration_tokens
from qplug.calibration.walk import Walk
from qplug.checkpoint.open import open_checkpoint
from qplug.machine.session import Session
from qplug.model.view import model_view
from qplug.numerics import dequantize, output_error
from qplug.reading.perplexity import evaluation_tokens
from qplug.recipe.recipe import Calibration
from qplug_gptq.gptq import GPTQ, Params

#: Experts are put together whose tokens are at least so many.
STEPS = (0, 1, 16, 64, 256, 1024, 4096, 16384)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("model", "calibration", "fresh"):
        parser.add_argument(name)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--windows", type=int, default=None, help="of the fresh text; default all")
    parser.add_argument("--priors", default="0,2")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    session = Session.alone(args.device)
    source = open_checkpoint(Path(args.model))
    view = model_view(source)
    schemes = dict.fromkeys(view.quantizable, preset("W4A16"))
    data = Calibration(
        dataset="text", options={"path": args.calibration}, samples=args.samples, seq_len=512
    )
    seen = calibration_tokens(data, args.model, view, session, seed=args.seed)
    fresh = evaluation_tokens(
        args.model,
        session,
        dataset="text",
        dataset_options={"path": args.fresh},
        seq_len=512,
        windows=args.windows,
    )
    priors = [float(prior) for prior in args.priors.split(",")]
    found: dict[tuple[float, str, int], list[tuple[float, float]]] = defaultdict(list)
    walks = [
        Walk(source, view, schemes, tokens, session, propagate="float")
        for tokens in (seen, Samples(fresh))
    ]
    with closing(walks[0]), closing(walks[1]):
        for name in view.blocks:
            block, judge = (walk.gather(name) for walk in walks)
            pairs = [
                (part, other)
                for group, same in zip(block.groups, judge.groups, strict=True)
                for part, other in zip(group.by_expert, same.by_expert, strict=True)
            ]
            pairs += [
                (group, same)
                for group, same in zip(block.groups, judge.groups, strict=True)
                if group.experts
            ]
            for prior in priors:
                made = GPTQ(Params(prior=prior)).quantize(block)
                for part, other in pairs:
                    step = max(step for step in STEPS if step <= part.tokens)
                    for linear in part.linears:
                        off = dequantize(made[linear.name]) - linear.weight
                        errors = (
                            output_error(off, other.gram),
                            output_error(linear.weight, other.gram),
                        )
                        local = linear.name.rpartition(".")[2]
                        if other.tokens:
                            found[prior, local, step].append(errors)
            for walk in walks:
                walk.advance(name, {})
            print(f"{name} is done", flush=True)
    kinds = sorted({kind for _, kind, _ in found})
    for kind in kinds:
        for prior in priors:
            parts = {step: found[prior, kind, step] for step in STEPS if found[prior, kind, step]}
            means = [
                f"{step}: {100 * sum(e / size for e, size in p) / len(p):.4f} ({len(p)})"
                for step, p in parts.items()
            ]
            both = [sum(pair[i] for p in parts.values() for pair in p) for i in (0, 1)]
            print(
                f"{kind:10s} prior {prior:g}: ",
                "  ".join(means),
                f" sum {100 * both[0] / both[1]:.4f}",
            )


if __name__ == "__main__":
    main()
