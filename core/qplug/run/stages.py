"""Runs the algorithms of a recipe and its exporter on a block, and names them in errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qplug.api import (
    Algorithm,
    Block,
    Checkpoint,
    Exporter,
    FloatModel,
    InputGroup,
    Linear,
    ModelView,
    Preparation,
    QuantizedWeight,
    WholeModel,
)
from qplug.api.algorithm import Effort
from qplug.api.scheme import Scheme
from qplug.calibration.observers import find_observer
from qplug.calibration.ranges import InputRange, clip_counts, four_digits, input_ranges
from qplug.calibration.shared_scales import (
    fix_input_scales,
    share_global_scales,
    share_tensor_scales,
)
from qplug.checkpoint.names import by_module, module_of, split_name
from qplug.checkpoint.open import INDEX, open_checkpoint
from qplug.errors import PluginError, QplugError, RelayedError
from qplug.machine.session import Session
from qplug.numerics.alike import side_by_side, together
from qplug.numerics.losses import relative_errors, relative_output_errors
from qplug.output.plan import Step
from qplug.recipe.pipeline import make_pipeline
from qplug.recipe.recipe import DEFAULT_QUANTIZER, Calibration, Recipe
from qplug.run.refuse import Decision, decide
from qplug.run.soundness import blaming_weights, refuse_not_finite, refuse_unsound

if TYPE_CHECKING:
    from torch import Tensor

from qplug.output.step_report import Report


class Stages:
    """The stages of a run: the algorithms of a recipe, of which one quantizes, and the exporter.

    ``recipe`` is the recipe without settings that these stages do not use.
    """

    def __init__(self, recipe: Recipe, session: Session) -> None:
        """Creates the components of ``recipe``.

        Raises QplugError if a name or an option is wrong, or if algorithms cannot be combined.
        """
        registry = self._registry = session.registry
        self._clock = session.clock
        self.exporter = registry.exporters.make(recipe.backend, recipe.backend_options)
        self.pipeline = make_pipeline(
            recipe.algorithms, recipe.algorithm_options, recipe.schemes, registry
        )
        quantizers = [algorithm for algorithm in self.pipeline if algorithm.quantizes()]
        self._default = registry.algorithms.make_own(DEFAULT_QUANTIZER)
        self.quantizer = quantizers[0] if quantizers else self._default
        calibration = recipe.calibration or Calibration()
        self._observer = find_observer(calibration.observer, calibration.observer_options)
        self._stores_ranges = recipe.stores_ranges
        self.recipe = self._settled(recipe)

    def _settled(self, recipe: Recipe) -> Recipe:
        """Returns ``recipe`` without settings that these stages do not use."""
        if not self.needs_data:
            return replace(recipe, calibration=None)
        if recipe.calibration and self.exporter.format.stores_float:
            # The exporter stores float weights; a resumed run has no others to pass data through.
            return replace(recipe, calibration=replace(recipe.calibration, propagate="float"))
        return recipe

    def decide(self, source: Checkpoint, view: ModelView) -> Decision:
        """Returns what to quantize of the float model ``source``, whose structure is ``view``.

        Raises QplugError as ``qplug.run.refuse.decide`` does.
        """
        return decide(self.recipe, view, self.exporter)

    def with_recipe(self, recipe: Recipe) -> Stages:
        """Returns the same components under ``recipe``, which differs in patterns alone."""
        other = copy(self)
        other.recipe = recipe
        return other

    @property
    def needs_data(self) -> bool:
        """Whether an algorithm reads statistics, or scales are stored that come from them."""
        return self._stores_ranges or any(algorithm.needs_data for algorithm in self.pipeline)

    def compute_models(self, *, check: bool, dry_run: bool) -> bool:
        """Whether a run computes a model or a copy of it, with the code of transformers.

        A run that only rounds does not, unless it measures what it wrote, as ``check`` asks. Which
        code opens the model is another question: see ``is_known_without_code``.
        """
        if self.preparing or self.recipe.kv_cache is not None:
            return True
        measures = check and not self.exporter.format.stores_float
        return not dry_run and (self.needs_data or measures)

    @property
    def by_group(self) -> bool:
        """Whether the input groups of a block may be quantized one after another."""
        return self.quantizer.by_group and not any(each.transforms() for each in self.pipeline)

    @property
    def needs_drift(self) -> bool:
        """Whether an algorithm reads the drift, the distance of inputs from the float model's."""
        return any(algorithm.needs_drift for algorithm in self.pipeline)

    @property
    def learns(self) -> bool:
        """Whether an algorithm computes outputs of whole blocks, to learn the float blocks'."""
        return any(algorithm.learns_blocks for algorithm in self.pipeline)

    @property
    def efforts(self) -> frozenset[Effort] | None:
        """What the algorithms spend their time on; None if that is not known of one of them."""
        algorithms = {*self.pipeline, self.quantizer}
        known = frozenset(a.effort for a in algorithms if a.effort is not None)
        return known if all(a.effort is not None for a in algorithms) else None

    @property
    def preparing(self) -> list[Algorithm[Any]]:
        """The algorithms that rewrite the float model."""
        return [algorithm for algorithm in self.pipeline if algorithm.prepares()]

    def prepare(self, algorithm: Algorithm[Any], model: FloatModel) -> Preparation:
        """Returns how ``algorithm`` rewrites the float model."""
        with self._naming_in_errors(algorithm, algorithm.name):
            return algorithm.prepare(model)

    @property
    def learning(self) -> list[str]:
        """The names of the algorithms that learn on the whole model how to rewrite the model."""
        return [algorithm.name for algorithm in self.pipeline if algorithm.learns_rewrite()]

    def learn(
        self, algorithm: Algorithm[Any], model: FloatModel, whole: WholeModel
    ) -> Mapping[str, Tensor]:
        """Returns the tensors that ``algorithm`` learns on ``whole``, under its own names."""
        with self._clock("learning"), self._naming_in_errors(algorithm, algorithm.name):
            return algorithm.learn_rewrite(model, whole)

    def quantize(self, block: Block) -> Mapping[str, QuantizedWeight]:
        """Runs all algorithms on ``block``; returns codes by linear, {} if floats are stored."""
        for algorithm in self.pipeline:
            with self._clock("transform"), self._naming_in_errors(algorithm, block.name):
                algorithm.transform(block)
        if self.exporter.format.stores_float:
            return {}
        return self._codes(block, self.quantizer)

    def quantize_apart(self, block: Block) -> Mapping[str, QuantizedWeight]:
        """Returns the codes of linears outside the decoder blocks, such as a head.

        There are no statistics of their inputs, so that they are rounded to nearest.
        """
        return self._codes(block, self._default)

    def _codes(self, block: Block, quantizer: Algorithm[Any]) -> Mapping[str, QuantizedWeight]:
        fix_input_scales(block, self._observer)
        share_tensor_scales(block)
        share_global_scales(block, self.exporter.merged([linear.name for linear in block.linears]))
        with (
            self._clock("quantize"),
            blaming_weights(block.linears),
            self._naming_in_errors(quantizer, block.name),
        ):
            codes = quantizer.quantize(block)
            names = {linear.name for linear in block.linears}
            if set(codes) != names:
                raise ValueError(f"it gave codes for {sorted(codes)}, not {sorted(names)}")
            refuse_unsound(block.linears, codes, self._called(quantizer))
        block.notes.extend(_unseen(block))
        return {
            linear.name: replace(
                codes[linear.name],
                input_scale=linear.input_scale,
                global_scale=linear.global_scale,
            )
            for linear in block.linears
        }

    def _called(self, algorithm: Algorithm[Any]) -> str:
        """Returns the name of ``algorithm``, with its plugin if that is none of qplug's own."""
        owner = self._registry.owner(algorithm)
        if owner is None or owner.ships_with_qplug:
            return algorithm.name
        return f"{algorithm.name} of plugin {owner}"

    def report(
        self,
        block: Block,
        codes: Mapping[str, QuantizedWeight],
        rewritten: tuple[str, ...] = (),
        inputs: Mapping[str, InputRange] | None = None,
    ) -> Report:
        """Returns the report on ``block``: its errors against the float weights, to four digits.

        ``rewritten`` are the names of changed float tensors, ``inputs`` the ranges of inputs before
        the transforms.
        """
        with self._clock("errors"):
            return self._report(block, codes, rewritten, inputs or {})

    def _report(
        self,
        block: Block,
        codes: Mapping[str, QuantizedWeight],
        rewritten: tuple[str, ...],
        inputs: Mapping[str, InputRange],
    ) -> Report:
        errors = self._errors(block, codes)
        losses = self._losses(block, codes)
        after = input_ranges(block)
        clips = clip_counts([linear for linear in block.linears if linear.name in losses], codes)
        return Report(
            errors,
            losses,
            rewritten,
            tuple(block.notes),
            inputs={name: (before, after[name]) for name, before in inputs.items()},
            clips=clips,
            experts=_tokens_of_experts(block),
        )

    def _errors(self, block: Block, codes: Mapping[str, QuantizedWeight]) -> dict[str, float]:
        """Returns the error of each weight, relative to its norm, by linear."""
        coded = [linear for linear in block.linears if linear.name in codes]
        pairs = [(block.original(linear), codes[linear.name]) for linear in coded]
        found = relative_errors(pairs)
        errors = {
            linear.name: four_digits(error) for linear, error in zip(coded, found, strict=True)
        }
        with blaming_weights(block.linears):
            refuse_not_finite(errors, "the error of its weight")
        return errors

    def _losses(self, block: Block, codes: Mapping[str, QuantizedWeight]) -> dict[str, float]:
        """Returns the error of each output over all tokens, relative to its norm, by linear."""
        parts = [part for whole in block.groups for part in whole.by_tokens if part.tokens]
        read = [
            (alike, linears)
            for alike in side_by_side(parts, block.processes)
            for linears in zip(*(group.linears for group in alike), strict=True)
            if linears[0].name in codes
        ]

        def losses_of(pair: tuple[Sequence[InputGroup], Sequence[Linear]]) -> list[float]:
            groups, linears = pair
            weight = together([block.original(linear) for linear in linears])
            quantized = [codes[linear.name] for linear in linears]
            gram = together([group.gram for group in groups])
            return [four_digits(loss) for loss in relative_output_errors(weight, quantized, gram)]

        in_order = block.spread(read, losses_of, cost=lambda pair: _products(*pair))
        losses = {
            linear.name: loss
            for (_, linears), found in zip(read, in_order, strict=True)
            for linear, loss in zip(linears, found, strict=True)
        }
        refuse_not_finite(losses, "the error of its output")
        return losses

    def pack(
        self, codes: Mapping[str, QuantizedWeight], step: Step, dtype: str
    ) -> dict[str, Tensor]:
        """Returns the packed tensors of the linears in ``step``, by full name.

        Raises StageError if they differ from the plan in name, dtype or shape.
        """
        packed: dict[str, Tensor] = {}
        copied = {*step.others}
        planned = by_module(name for name in step.outputs if name not in copied)
        with self._clock("pack"):
            for name, weight in codes.items():
                with self._naming_in_errors(self.exporter, name):
                    tensors = self._packed(weight, step.linears[name], dtype)
                    packed.update({f"{name}.{local}": tensor for local, tensor in tensors.items()})
                    for local in planned.get(name, ()):
                        _check(f"{name}.{local}", packed, step)
            if any(weight.codes.is_cuda for weight in codes.values()):
                torch.cuda.synchronize()  # the copies of all tensors are waited for once
        return packed

    def _packed(self, weight: QuantizedWeight, scheme: Scheme, dtype: str) -> dict[str, Tensor]:
        tensors = self.exporter.format.pack(weight, scheme, dtype)
        return {local: tensor.to("cpu", non_blocking=True) for local, tensor in tensors.items()}

    def convert(self, folder: Path, model: ModelView, schemes: Mapping[str, Scheme]) -> None:
        """Replaces the shards in ``folder`` by the format's own file, if it has one."""
        file = self.exporter.format.single_file
        if file is None:
            return
        finished = open_checkpoint(folder)
        path = folder / file.name
        with self._naming_in_errors(self.exporter, file.name):
            file.write(finished, model, schemes, path)
            if not path.is_file():
                raise ValueError(f"write left no {path.name}")
        for replaced in (*finished.shards, folder / INDEX):
            replaced.unlink(missing_ok=True)

    @contextmanager
    def _naming_in_errors(
        self, component: Algorithm[Any] | Exporter[Any], where: str
    ) -> Iterator[None]:
        """A context that adds ``where`` to a QplugError, and the plugin too to any other error."""
        try:
            with self._registry.blaming(component, where):
                yield
        except (PluginError, RelayedError):
            raise  # already names the place
        except QplugError as error:
            raise QplugError(f"{where}: {error}") from error


def _check(tensor: str, packed: Mapping[str, Tensor], step: Step) -> None:
    """Raises ValueError if ``tensor`` is missing, or differs from its spec in ``step``."""
    spec = step.computed(tensor)
    if tensor not in packed:
        raise ValueError(f"pack gave no {tensor}, which layout promised")
    value = packed[tensor]
    if (str(value.dtype).removeprefix("torch."), tuple(value.shape)) != (spec.dtype, spec.shape):
        raise ValueError(
            f"pack gave {tensor} as {value.dtype} {list(value.shape)}, but layout promised "
            f"{spec.dtype} {list(spec.shape)}"
        )


def _tokens_of_experts(block: Block) -> dict[str, tuple[int, ...]]:
    """Returns the numbers of tokens of the experts of each layer of ``block``, by layer."""
    found: dict[str, list[int]] = {}
    for whole in block.groups:
        for group in whole.by_expert:
            layer, _ = split_name(module_of(group.linears[0].name))
            found.setdefault(layer, []).append(group.tokens)
    return {layer: tuple(counts) for layer, counts in found.items()}


def _unseen(block: Block) -> Iterator[str]:
    """Yields a note for each layer with experts that received no calibration token."""
    unseen: dict[str, list[str]] = {}
    for whole in block.groups:
        for group in whole.by_expert:
            if not group.tokens:
                layer, number = split_name(module_of(group.linears[0].name))
                unseen.setdefault(layer, []).append(number)
    for layer, numbers in unseen.items():
        yield f"{layer}: no token reached {', '.join(numbers)}"


def _products(groups: Sequence[InputGroup], linears: Sequence[Linear]) -> float:
    """Returns the number of products in ``weight @ gram``, as a measure of its cost."""
    return sum(linear.weight.numel() for linear in linears) * groups[0].width
