"""What every algorithm must keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qplug.api import Algorithm, Block, InputGroup, QuantizedWeight
from qplug.api.groups import dequantize
from qplug.api.scheme import Scheme, preset
from qplug.numerics.activations import fake_quantize_activations
from qplug.numerics.rounding import code_dtype, nearest
from qplug.numerics.scales import minmax_scale
from qplug.testing.blocks import tiny_block, tiny_linear
from qplug.testing.checking import ComponentContract, demand, demanding, refusal, same
from qplug.testing.models import write_tiny_model
from qplug.testing.registries import KitText, registry_with

Codes = Mapping[str, QuantizedWeight]


class AlgorithmContract(ComponentContract):
    """Subclass it as ``class TestMine(AlgorithmContract): algorithm = Mine``.

    ``schemes``: names of those to test with; those of groups have 16 columns in one.
    ``worst_ratio``: how much larger the error of outputs on calibration data may be than that of
    rounding to nearest, for an algorithm that reads such data. ``whole_run``: the scheme of a run
    from checkpoint to folder, of 8-bit weights.
    """

    algorithm: ClassVar[type[Algorithm[Any]]]
    schemes: ClassVar[tuple[str, ...]] = ("W4A16", "W4A16_ASYM", "W8A8")
    worst_ratio: ClassVar[float] = 1.0
    whole_run: ClassVar[str] = "W8A16"

    def component(self) -> type[Algorithm[Any]]:
        return self.algorithm

    # --- codes -----------------------------------------------------------------------------------

    def test_codes_are_well_made(self) -> None:
        for scheme in self._schemes():
            block = self._block(scheme)
            self._check(scheme, block, self._run(block))

    def test_float_dtypes_of_checkpoints(self) -> None:
        if not self._runs_without_data():
            return
        for dtype in ("bfloat16", "float16", "float32"):
            for scheme in self._schemes():
                block = tiny_linear(scheme, dtype=dtype)
                self._check(scheme, block, self._run(block), f" of a {dtype} weight")

    def test_same_input_same_codes(self) -> None:
        for scheme in self._schemes():
            one, other = (self._run(self._block(scheme)) for _ in range(2))
            for name in one:
                for part in ("codes", "scale", "zero"):
                    demand(
                        same(getattr(one[name], part), getattr(other[name], part)),
                        f"{self._who}: two runs on the same block give other {part}: draw random "
                        "numbers from a generator with a fixed seed",
                    )

    def test_the_block_is_left_as_it_was(self) -> None:
        for scheme in self._schemes():
            block = tiny_block(scheme, movable=False)
            weights = {linear.name: linear.weight.clone() for linear in block.linears}
            known = [_tensors(group) for group in block.groups]
            kept = [{name: t.clone() for name, t in tensors.items()} for tensors in known]
            self._run(block)
            for linear in block.linears:
                demand(
                    same(block.original(linear), weights[linear.name]),
                    f"{self._who} changes the weight of {linear.name} in place: clone it, or say "
                    "block.replace(linear, weight) if another one is meant",
                )
            for before, after in zip(kept, known, strict=True):
                for name, tensor in before.items():
                    demand(
                        same(tensor, after[name]),
                        f"{self._who} changes InputGroup.{name} in place: clone it first",
                    )

    def test_chosen_scales_are_kept(self) -> None:
        if not self.algorithm.quantizes():
            return
        for scheme in self._schemes():
            block = self._block(scheme)
            self._transform(block)
            chosen = {
                linear.name: minmax_scale(linear.weight * 0.75, linear.args)
                for linear in block.linears
            }
            for linear in block.linears:
                # Clones: an algorithm may change those of the block in place.
                scale, zero = chosen[linear.name]
                linear.scale, linear.zero = scale.clone(), None if zero is None else zero.clone()
            for name, made in self._quantize(block).items():
                scale, zero = chosen[name]
                demand(
                    same(made.scale, scale) and same(made.zero, zero),
                    f"{self._who}.quantize drops the scale that an algorithm before chose: take "
                    "qplug.numerics.scales.scale_of(linear), so that awq+... composes",
                )

    # --- what real models have -------------------------------------------------------------------

    def test_dead_channels_and_zero_rows(self) -> None:
        for scheme in self._schemes():
            block = tiny_block(scheme, dead_channel=True)
            for linear in block.linears:
                linear.weight[1] = 0
            self._check(scheme, block, self._run(block), " with a dead channel and a row of zeros")

    def test_a_block_that_no_token_reached(self) -> None:
        if self.algorithm.learns:
            return  # what it learns from are the tokens that go through the block
        for scheme in self._schemes():
            block = tiny_block(scheme, tokens=0)
            for group in block.groups:  # what nothing was seen of has no extremes
                group.low.zero_()
                group.high.zero_()
            self._check(scheme, block, self._run(block), " that no token reached")

    def test_one_row(self) -> None:
        if self._runs_without_data():
            for scheme in self._schemes():
                block = tiny_linear(scheme, rows=1)
                self._check(scheme, block, self._run(block), " of one row")

    def test_a_width_that_groups_do_not_divide(self) -> None:
        scheme = preset("W4A16").with_group_size(16)
        if not self._runs_without_data():
            return
        block = tiny_linear(scheme, width=40)
        codes: dict[str, QuantizedWeight] = {}
        if refusal(lambda: codes.update(self._run(block))) is None:
            self._check(scheme, block, codes, " of 40 columns in groups of 16")

    # --- what it is for --------------------------------------------------------------------------

    def test_is_no_worse_than_rounding_to_nearest(self) -> None:
        if not self.algorithm.needs_data or self.algorithm.prepares():
            return
        for scheme in self._schemes():
            plain, block = tiny_block(scheme), tiny_block(scheme)
            rounded = {linear.name: nearest(linear) for linear in plain.linears}
            made = self._run(block)
            limit = _output_error(plain, rounded) * self.worst_ratio
            error = _output_error(block, made)
            demand(
                error <= limit * (1 + 1e-4),
                f"{self._who}: with {scheme.name} the error of outputs on calibration data is "
                f"{error / limit:.3f} times what it may be (rounding to nearest, times "
                f"worst_ratio = {self.worst_ratio})",
            )

    def test_a_whole_run(self, tmp_path: Path) -> None:
        from qplug.run.quantize import quantize

        kind = self.algorithm
        registry = registry_with(kind)
        model = write_tiny_model(tmp_path / "model")
        with demanding(f"{self._who}: a run with --algo {kind.name} fails"):
            result = quantize(
                str(model),
                tmp_path / "out",
                algo=kind.name,
                scheme=self.whole_run,
                group_size=32 if preset(self.whole_run).weights.strategy == "group" else None,
                backend="fake",
                dataset=KitText.name,
                samples=4,
                seq_len=16,
                algorithm_options={kind.name: dict(self.options)},
                device="cpu",
                registry=registry,
            )
        worst = max(result.errors.values())
        demand(
            worst < 0.5,
            f"{self._who}: 8-bit weights are off by {worst:.0%}: codes and scales do not belong "
            "together",
        )

    # --- how -------------------------------------------------------------------------------------

    @property
    def _who(self) -> str:
        return self.algorithm.__qualname__

    def _schemes(self) -> list[Scheme]:
        found = [preset(name) for name in self.schemes]
        demand(found, f"{type(self).__qualname__}.schemes names none to test {self._who} with")
        return [s.with_group_size(16) if s.weights.strategy == "group" else s for s in found]

    def _runs_without_data(self) -> bool:
        return not self.algorithm.needs_data

    def _block(self, scheme: Scheme) -> Block:
        return tiny_linear(scheme) if self._runs_without_data() else tiny_block(scheme)

    def _transform(self, block: Block) -> Algorithm[Any]:
        made: Algorithm[Any] = self.make()
        with demanding(f"{self._who}.transform fails on {block.name}"):
            made.transform(block)
        return made

    def _quantize(self, block: Block, made: Algorithm[Any] | None = None) -> Codes:
        made = made or self.make()
        if not made.quantizes():
            return {linear.name: nearest(linear) for linear in block.linears}
        return made.quantize(block)

    def _run(self, block: Block) -> Codes:
        """All stages; codes are the nearest if the algorithm leaves them to another."""
        return self._quantize(block, self._transform(block))

    def _check(self, scheme: Scheme, block: Block, codes: Codes, of: str = "") -> None:
        who, args = f"{self._who}: {scheme.name}{of}", scheme.weights
        wanted = {linear.name: linear for linear in block.linears}
        demand(
            set(codes) == set(wanted),
            f"{who}: quantize must give codes for {sorted(wanted)}, and gave {sorted(codes)}",
        )
        for name, linear in wanted.items():
            made, shape = codes[name], linear.weight.shape
            demand(
                made.codes.shape == shape and made.codes.dtype == code_dtype(args),
                f"{who}: codes of {name} must be {code_dtype(args)} {list(shape)}, not "
                f"{made.codes.dtype} {list(made.codes.shape)}",
            )
            low, high = args.code_range
            demand(
                low <= int(made.codes.min()) and int(made.codes.max()) <= high,
                f"{who}: codes of {name} leave the range {low} to {high}: clamp them",
            )
            scales = args.scale_shape((shape[0], shape[1]))
            demand(
                tuple(made.scale.shape) == scales and made.scale.dtype == torch.float32,
                f"{who}: scales of {name} must be float32 {list(scales)}, not "
                f"{made.scale.dtype} {list(made.scale.shape)}",
            )
            demand(
                torch.isfinite(made.scale).all() and (made.scale > 0).all(),
                f"{who}: scales of {name} must be positive and finite, also where weights are zero",
            )
            stored = made.scale.to(getattr(torch, args.scale_dtype)).float()
            demand(
                same(stored, made.scale),
                f"{who}: scales of {name} cannot be stored as {args.scale_dtype}: round them by "
                "qplug.numerics.rounding.as_stored before codes are computed",
            )
            zero = made.zero
            demand(
                (zero is None) if args.symmetric else (zero is not None),
                f"{who}: zero points of {name} are for asymmetric schemes, and for those alone",
            )
            demand(
                zero is None or (zero.dtype == torch.uint8 and zero.shape == made.scale.shape),
                f"{who}: zero points of {name} must be uint8, shaped like scales",
            )


def _tensors(group: InputGroup) -> dict[str, Tensor]:
    values = {field.name: getattr(group, field.name) for field in fields(group)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _output_error(block: Block, codes: Codes) -> float:
    """The mean squared relative error of what linears give for the sample of their inputs.

    Inputs are rounded as the scheme says; wanted is what the float weights give.
    """
    errors = []
    for group in block.groups:
        for linear in group.linears:
            x = wanted = group.sample
            if linear.activations is not None:
                x = fake_quantize_activations(x, linear.activations)
            wanted = wanted @ block.original(linear).T
            off = x @ dequantize(codes[linear.name]).T - wanted
            errors.append((off.square().sum() / wanted.square().sum()).item())
    return sum(errors) / len(errors)
