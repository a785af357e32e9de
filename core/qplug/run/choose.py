"""Chooses the schemes of a recipe with ``--scheme auto``, and writes the recipe that says so."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qplug.api import Exporter, ModelView
from qplug.api.events import Choice, ChosenGroup
from qplug.api.scheme import Scheme
from qplug.api.tensors import Checkpoint
from qplug.calibration.batches import samples_in_a_batch
from qplug.calibration.samples import Samples
from qplug.calibration.tokens import calibration_tokens
from qplug.choosing.candidates import candidates, families, served_schemes
from qplug.choosing.decisions import Decision, decisions, weights_of
from qplug.choosing.float_passes import FloatPasses
from qplug.choosing.folder_bytes import other_bytes
from qplug.choosing.patterns import as_recipe
from qplug.choosing.sensitivity import divergence, fisher
from qplug.choosing.solver import Solution, cheapest
from qplug.errors import QplugError
from qplug.machine.memory import parse_size
from qplug.machine.session import Session
from qplug.output.manifest import read_manifest
from qplug.output.origins import public_values
from qplug.output.unfinished import kept_fingerprint
from qplug.recipe.assign import assign
from qplug.recipe.pipeline import make_pipeline
from qplug.recipe.recipe import Calibration, Recipe
from qplug.recipe.spelled_scheme import scheme_text
from qplug.recipe.spellings import AUTO
from qplug.registry.registry import Registry
from qplug.run.drafts import open_model
from qplug.run.refuse import open_source

#: Windows of calibration data on which losses are estimated; measuring takes far longer.
_WINDOWS = {"fisher": 16, "divergence": 4}

#: The key of the choice in the fingerprint of a run and in qplug.json.
CHOICE = "choice"


@dataclass(frozen=True)
class Chosen:
    """A recipe without ``auto``, the ``choice`` behind it, and the recipe that ``asked`` for it."""

    recipe: Recipe
    choice: Choice
    asked: Recipe

    def to_dict(self) -> dict[str, Any]:
        """A mapping for JSON, from which ``kept`` reads the choice."""
        plain = _as_json({"asked": self.asked.to_dict(), **asdict(self.choice)})
        assert isinstance(plain, dict)
        return plain


def choose(model: str, out: Path, asked: Recipe, session: Session) -> Chosen:
    """Returns the recipe that ``asked``, whose scheme is ``auto``, stands for.

    An unfinished run of ``out`` that asked for the same keeps its choice. All processes must call
    this together. Raises QplugError if nothing can be chosen, or if the budget cannot be reached.
    """
    kept = session.processes.from_first(lambda: _kept(kept_fingerprint(out), asked))
    if kept is not None:
        return kept
    exporter = session.registry.exporters.make(asked.backend, asked.backend_options)
    if exporter.format.stores_float:
        raise QplugError(f"--scheme auto: {exporter.name} stores float weights; take another")
    schemes, reason = accepted(served_schemes(exporter), asked, session.registry)
    if not schemes:
        raise reason or QplugError("--scheme auto: the backend serves no scheme on this device")
    source, skeleton = open_source(model, out, exporter, session)
    source, view = open_model(asked, source, session, skeleton)
    problem = _Problem.of(asked, schemes, source, view, exporter)
    limit = problem.limit(asked)
    problem.refuse_unreachable(asked, limit)
    with session.clock("choosing"):
        samples = _windows(model, asked, view, session)
        losses = session.processes.from_first(
            lambda: _losses(problem, asked, samples, source, view, session)
        )
    return problem.solved(asked, losses, limit, samples.count)


def _kept(fingerprint: Mapping[str, Any], asked: Recipe) -> Chosen | None:
    """The choice of an unfinished run with ``fingerprint``; None if it asked for another."""
    record = fingerprint.get(CHOICE)
    if not isinstance(record, dict) or not has_asked(record, asked):
        return None
    values = {name: value for name, value in record.items() if name != "asked"}
    groups = tuple(ChosenGroup(**group) for group in values.pop("groups"))
    recipe = Recipe.from_dict(fingerprint["recipe"])
    return Chosen(recipe, Choice(**values, groups=groups), asked)


def has_asked(record: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether ``record``, which ``Chosen.to_dict`` wrote to JSON, is a choice for ``recipe``.

    Of paths on this machine only the names are compared, since a finished folder has no more.
    """
    asked = public_values(record.get("asked"))
    return bool(asked == public_values(_as_json(recipe.to_dict())))


def _as_json(value: Any) -> Any:
    """``value`` as JSON gives it back: tuples are lists."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(inner) for key, inner in value.items()}
    return [_as_json(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def accepted(
    schemes: Sequence[Scheme], recipe: Recipe, registry: Registry
) -> tuple[list[Scheme], QplugError | None]:
    """Returns the members of ``schemes`` that all algorithms of ``recipe`` take.

    The second value is why the last scheme that is not among them was refused, None if all are.
    """
    taken, reason = [], None
    for scheme in schemes:
        try:
            make_pipeline(recipe.algorithms, recipe.algorithm_options, [scheme], registry)
            taken.append(scheme)
        except QplugError as error:
            reason = error
    return taken, reason


def _windows(model: str, asked: Recipe, view: ModelView, session: Session) -> Samples:
    """The first windows of the calibration data."""
    data = asked.calibration or Calibration()
    drawn = session.processes.from_first(
        lambda: calibration_tokens(data, model, view, session, seed=asked.seed)
    )
    return drawn.first(_WINDOWS[asked.budget.sensitivity])


@dataclass(frozen=True)
class _Problem:
    """What can be chosen: candidates by decision, in each way that the backend takes mixtures.

    ``sizes`` are the bytes of each candidate. ``stored`` has the schemes with the dtype in which
    the backend stores scales. ``others`` are the bytes of the rest of the folder, at most.
    """

    ways: tuple[dict[Decision, list[Scheme | None]], ...]
    options: dict[Decision, list[Scheme | None]]
    sizes: dict[Decision, dict[Scheme | None, int]]
    stored: dict[Scheme | None, Scheme | None]
    others: int
    view: ModelView
    exporter: Exporter[Any]

    @classmethod
    def of(
        cls,
        asked: Recipe,
        schemes: Sequence[Scheme],
        source: Checkpoint,
        view: ModelView,
        exporter: Exporter[Any],
    ) -> _Problem:
        assigned = assign(asked, view, exporter.built_float(view))
        fixed = {name: scheme for name, scheme in assigned.items() if scheme != AUTO}
        found = decisions(assigned, exporter)
        options = candidates(found, schemes, view, exporter, fixed)
        ways = tuple(families(options, view, exporter))
        if not ways:
            raise QplugError(
                f"--scheme auto: {exporter.name} serves no scheme for this model on its device"
            )
        used = dict.fromkeys(scheme for each in options.values() for scheme in each)
        stored = {
            scheme: scheme
            and scheme.with_scale_dtype(exporter.format.scale_dtype(scheme, view.dtype))
            for scheme in used
        }
        sizes = {
            decision: {
                scheme: _bytes(decision, stored[scheme], source, view, exporter) for scheme in each
            }
            for decision, each in options.items()
        }
        return cls(ways, options, sizes, stored, other_bytes(source, assigned), view, exporter)

    @property
    def weights(self) -> int:
        """The number of weights in all decisions."""
        return sum(weights_of(decision, self.view.linears) for decision in self.options)

    def limit(self, asked: Recipe) -> float:
        """The bytes that all decisions may take together; for ``--max-kl`` the loss, in nats."""
        budget = asked.budget
        if budget.bits is not None:
            return math.floor(budget.bits * self.weights / 8)
        if budget.size is not None:
            return parse_size(budget.size) - self.others
        assert budget.max_kl is not None
        return budget.max_kl

    def refuse_unreachable(self, asked: Recipe, limit: float) -> None:
        """Raises QplugError if no choice takes as few bytes as ``limit``."""
        if asked.budget.max_kl is not None:
            return
        least = min(
            sum(min(self.sizes[d][s] for s in each) for d, each in way.items()) for way in self.ways
        )
        if least <= limit:
            return
        if asked.budget.bits is not None:
            bits = math.ceil(8000 * least / self.weights) / 1000
            sentence = f"the fewest that {self.exporter.name} serves are {bits:g}"
            raise QplugError(f"--bits {asked.budget.bits:g}: cannot be reached: {sentence}")
        nbytes = math.ceil((least + self.others) / 1e5) / 10
        raise QplugError(
            f"--size {asked.budget.size}: cannot be reached: the smallest folder that "
            f"{self.exporter.name} serves takes {nbytes:g}MB"
        )

    def solved(
        self,
        asked: Recipe,
        losses: Mapping[Decision, Mapping[Scheme | None, float]],
        limit: float,
        tokens: int,
    ) -> Chosen:
        """Returns the best choice within ``limit``. Raises QplugError if there is none."""
        by_loss = asked.budget.max_kl is not None
        best: tuple[Solution, dict[Decision, list[Scheme | None]]] | None = None
        for way in self.ways:
            loss = [[losses[d][scheme] for scheme in each] for d, each in way.items()]
            size = [[self.sizes[d][scheme] for scheme in each] for d, each in way.items()]
            found = cheapest(size, loss, limit) if by_loss else cheapest(loss, size, limit)
            if found is not None and (best is None or found.cost < best[0].cost):
                best = found, way
        if best is None:
            least = min(
                sum(min(losses[d][scheme] for scheme in each) for d, each in way.items())
                for way in self.ways
            )
            raise QplugError(
                f"--max-kl {limit:g}: cannot be reached: the least that {self.exporter.name} "
                f"serves is estimated at {least:.2g}"
            )
        solution, way = best
        taken = {
            decision: each[number]
            for (decision, each), number in zip(way.items(), solution.choices, strict=True)
        }
        return self._chosen(asked, taken, losses, solution.bound, tokens)

    def _chosen(
        self,
        asked: Recipe,
        taken: Mapping[Decision, Scheme | None],
        losses: Mapping[Decision, Mapping[Scheme | None, float]],
        bound: float,
        tokens: int,
    ) -> Chosen:
        if not any(taken.values()):
            flag, value = next(iter(asked.budget.limits.items()))
            raise QplugError(f"{flag} {value}: the float model is within this budget; lower it")
        assigned = {name: taken[d] for d in taken for name in d.linears}
        recipe = as_recipe(asked, assigned, self.view)
        got = assign(recipe, self.view, self.exporter.built_float(self.view))
        if got != {name: scheme for name, scheme in assigned.items() if scheme is not None}:
            raise AssertionError("the patterns of the recipe do not give the chosen schemes")
        groups = []
        for decision, scheme in taken.items():
            weights = weights_of(decision, self.view.linears)
            nbytes = self.sizes[decision][scheme]
            name = "float" if scheme is None else scheme_text(scheme)
            loss = losses[decision][scheme]
            groups.append(ChosenGroup(decision.name, name, weights, 8 * nbytes / weights, loss))
        nbytes = sum(self.sizes[decision][scheme] for decision, scheme in taken.items())
        choice = Choice(
            asked.budget.limits,
            asked.budget.sensitivity,
            tokens,
            tuple(groups),
            8 * nbytes / self.weights,
            nbytes,
            math.fsum(group.loss for group in groups),
            bound,
        )
        return Chosen(recipe, choice, asked)


def _bytes(
    decision: Decision,
    scheme: Scheme | None,
    source: Checkpoint,
    view: ModelView,
    exporter: Exporter[Any],
) -> int:
    """The bytes of the tensors that stand for the weights of ``decision`` in ``scheme``."""
    if scheme is None:
        return sum(source.tensors[f"{name}.weight"].nbytes for name in decision.linears)
    return sum(
        spec.nbytes
        for name in decision.linears
        for spec in exporter.format.layout(view.linears[name], scheme, view.dtype).values()
    )


def _losses(
    problem: _Problem,
    asked: Recipe,
    samples: Samples,
    source: Checkpoint,
    view: ModelView,
    session: Session,
) -> dict[Decision, dict[Scheme | None, float]]:
    """The estimated loss of each candidate, in nats a token."""
    manifest = read_manifest(source.folder)
    passes = FloatPasses(source, view, manifest.online if manifest else (), session)
    stored = {d: [problem.stored[s] for s in each] for d, each in problem.options.items()}
    size = asked.calibration.batch_size if asked.calibration else None
    batch_size = size or samples_in_a_batch(samples.length, session.device)
    if asked.budget.sensitivity == "divergence":
        found = divergence(passes, stored, samples, batch_size, watch=lambda *_: None)
    else:
        found = fisher(passes, stored, samples, batch_size, seed=asked.seed, watch=lambda *_: None)
    return {
        decision: {scheme: max(0.0, found[decision][problem.stored[scheme]]) for scheme in each}
        for decision, each in problem.options.items()
    }
