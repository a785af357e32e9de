"""The contract of algorithms."""

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
    """The tests of an algorithm: ``class TestMine(AlgorithmContract): algorithm = Mine``.

    ``schemes`` are the names of the schemes to test with; groups have 16 columns. ``worst_ratio``
    is the largest allowed ratio of the algorithm's output error on calibration data to the output
    error of rounding to nearest; it is tested for algorithms that need data. ``whole_run`` is the
    name of a scheme with 8-bit weights, for the test of a run from checkpoint to folder.
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
            first, second = (self._run(self._block(scheme)) for _ in range(2))
            for name in first:
                for field in ("codes", "scale", "zero"):
                    demand(
                        same(getattr(first[name], field), getattr(second[name], field)),
                        f"{self._who}: two runs on the same block give different {field}: draw "
                        "random numbers from a generator with a fixed seed",
                    )

    def test_the_block_is_left_as_it_was(self) -> None:
        for scheme in self._schemes():
            block = tiny_block(scheme, movable=False)
            weights = {linear.name: linear.weight.clone() for linear in block.linears}
            statistics = [_tensors(group) for group in block.groups]
            copies = [{name: t.clone() for name, t in tensors.items()} for tensors in statistics]
            self._run(block)
            for linear in block.linears:
                demand(
                    same(block.original(linear), weights[linear.name]),
                    f"{self._who} changes the weight of {linear.name} in place: clone it, or call "
                    "block.replace(linear, weight) to give the linear another weight",
                )
            for before, after in zip(copies, statistics, strict=True):
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
                # Clones: an algorithm may change the tensors of the block in place.
                scale, zero = chosen[linear.name]
                linear.scale, linear.zero = scale.clone(), None if zero is None else zero.clone()
            for name, quantized in self._quantize(block).items():
                scale, zero = chosen[name]
                demand(
                    same(quantized.scale, scale) and same(quantized.zero, zero),
                    f"{self._who}.quantize ignores the scale that an earlier algorithm chose: use "
                    "qplug.numerics.scale_of(linear), so that awq+... composes",
                )

    # --- what real models have -------------------------------------------------------------------

    def test_dead_channels_and_zero_rows(self) -> None:
        for scheme in self._schemes():
            block = tiny_block(scheme, dead_channel=True)
            for linear in block.linears:
                linear.weight[1] = 0
            self._check(scheme, block, self._run(block), " with a dead channel and a row of zeros")

    def test_a_block_that_no_token_reached(self) -> None:
        if self.algorithm.learns_blocks:
            return  # it learns from the tokens that go through the block
        for scheme in self._schemes():
            block = tiny_block(scheme, tokens=0)
            for group in block.groups:  # as qplug sets the extremes of inputs without tokens
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
            quantized = self._run(block)
            limit = _output_error(plain, rounded) * self.worst_ratio
            error = _output_error(block, quantized)
            demand(
                error <= limit * (1 + 1e-4),
                f"{self._who}: with {scheme.name} the error of outputs on calibration data is "
                f"{error / limit:.3f} times the limit (the error of rounding to nearest, times "
                f"worst_ratio = {self.worst_ratio})",
            )

    def test_a_whole_run(self, tmp_path: Path) -> None:
        from qplug.run.quantize import quantize

        name = self.algorithm.name
        registry = registry_with(self.algorithm)
        model = write_tiny_model(tmp_path / "model")
        with demanding(f"{self._who}: a run with --algo {name} fails"):
            result = quantize(
                str(model),
                tmp_path / "out",
                algo=name,
                scheme=self.whole_run,
                group_size=32 if preset(self.whole_run).weights.strategy == "group" else None,
                backend="fake",
                dataset=KitText.name,
                samples=4,
                seq_len=16,
                algorithm_options={name: dict(self.options)},
                device="cpu",
                registry=registry,
            )
        worst = max(result.errors.values())
        demand(
            worst < 0.5,
            f"{self._who}: 8-bit weights have an error of {worst:.0%}: codes and scales do not "
            "belong together",
        )

    # --- how -------------------------------------------------------------------------------------

    @property
    def _who(self) -> str:
        return self.algorithm.__qualname__

    def _schemes(self) -> list[Scheme]:
        schemes = [preset(name) for name in self.schemes]
        demand(schemes, f"{type(self).__qualname__}.schemes names none to test {self._who} with")
        return [s.with_group_size(16) if s.weights.strategy == "group" else s for s in schemes]

    def _runs_without_data(self) -> bool:
        return not self.algorithm.needs_data

    def _block(self, scheme: Scheme) -> Block:
        return tiny_linear(scheme) if self._runs_without_data() else tiny_block(scheme)

    def _transform(self, block: Block) -> Algorithm[Any]:
        algorithm: Algorithm[Any] = self.make()
        with demanding(f"{self._who}.transform fails on {block.name}"):
            algorithm.transform(block)
        return algorithm

    def _quantize(self, block: Block, algorithm: Algorithm[Any] | None = None) -> Codes:
        algorithm = algorithm or self.make()
        if not algorithm.quantizes():
            return {linear.name: nearest(linear) for linear in block.linears}
        return algorithm.quantize(block)

    def _run(self, block: Block) -> Codes:
        """Returns codes by linear after all stages; nearest codes if the algorithm gives none."""
        return self._quantize(block, self._transform(block))

    def _check(self, scheme: Scheme, block: Block, codes: Codes, of: str = "") -> None:
        """Demands that ``codes`` are complete and valid; ``of`` describes the block in messages."""
        who, args = f"{self._who}: {scheme.name}{of}", scheme.weights
        linears = {linear.name: linear for linear in block.linears}
        demand(
            set(codes) == set(linears),
            f"{who}: quantize must give codes for {sorted(linears)}, and gave {sorted(codes)}",
        )
        for name, linear in linears.items():
            quantized, shape = codes[name], linear.weight.shape
            demand(
                quantized.codes.shape == shape and quantized.codes.dtype == code_dtype(args),
                f"{who}: codes of {name} must be {code_dtype(args)} {list(shape)}, not "
                f"{quantized.codes.dtype} {list(quantized.codes.shape)}",
            )
            low, high = args.code_range
            demand(
                low <= int(quantized.codes.min()) and int(quantized.codes.max()) <= high,
                f"{who}: codes of {name} leave the range {low} to {high}: clamp them",
            )
            scale = quantized.scale
            scale_shape = args.scale_shape((shape[0], shape[1]))
            demand(
                tuple(scale.shape) == scale_shape and scale.dtype == torch.float32,
                f"{who}: scales of {name} must be float32 {list(scale_shape)}, not "
                f"{scale.dtype} {list(scale.shape)}",
            )
            demand(
                torch.isfinite(scale).all() and (scale > 0).all(),
                f"{who}: scales of {name} must be positive and finite, also where weights are zero",
            )
            stored = scale.to(getattr(torch, args.scale_dtype)).float()
            demand(
                same(stored, scale),
                f"{who}: scales of {name} cannot be stored as {args.scale_dtype}: round them with "
                "qplug.numerics.as_stored before codes are computed",
            )
            zero = quantized.zero
            demand(
                (zero is None) if args.symmetric else (zero is not None),
                f"{who}: {name} must have zero points if the scheme is asymmetric, and only then",
            )
            demand(
                zero is None or (zero.dtype == torch.uint8 and zero.shape == scale.shape),
                f"{who}: zero points of {name} must be uint8, shaped like scales",
            )


def _tensors(group: InputGroup) -> dict[str, Tensor]:
    """Returns the statistics of ``group`` that are tensors, by name."""
    values = {field.name: getattr(group, field.name) for field in fields(group)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _output_error(block: Block, codes: Codes) -> float:
    """Returns the mean over linears of the squared relative error of their outputs.

    The outputs are those for the sample of the linears' inputs, with dequantized weights and with
    inputs rounded as the scheme says. They are compared with the outputs of float weights and
    inputs.
    """
    errors = []
    for group in block.groups:
        for linear in group.linears:
            x = group.sample
            float_output = x @ block.original(linear).T
            if linear.activations is not None:
                x = fake_quantize_activations(x, linear.activations)
            difference = x @ dequantize(codes[linear.name]).T - float_output
            errors.append((difference.square().sum() / float_output.square().sum()).item())
    return sum(errors) / len(errors)
