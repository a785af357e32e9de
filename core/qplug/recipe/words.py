"""The keywords for a recipe on the command line and in Python, and how they change a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast, get_args

from qplug.api.params import Field, Param, fields_of
from qplug.api.scheme import Scheme
from qplug.errors import QplugError
from qplug.recipe.fields import Key, key_of
from qplug.recipe.recipe import Calibration, Export, Job, Recipe
from qplug.recipe.spellings import parse_scheme

if TYPE_CHECKING:
    from qplug.recipe.budget import Sensitivity
    from qplug.recipe.recipe import (
        DraftLayers,
        Mask,
        ObserverName,
        Propagation,
        Sampling,
        SeenExperts,
    )


class RecipeWords(TypedDict, total=False):
    """The keywords of ``qplug.quantize`` that make a recipe; a test compares them with ``words``.

    ``algo`` is one algorithm or several (``"awq+gptq"``). ``group_size`` replaces the group size of
    ``scheme``. ``overrides`` maps patterns of module names to schemes. None means the same as
    leaving the keyword out.
    """

    algo: str
    scheme: str | Scheme
    group_size: int | None
    bits: float | None
    size: str | None
    max_kl: float | None
    sensitivity: Sensitivity
    backend: str
    overrides: Mapping[str, str | Scheme] | None
    ignore: Sequence[str]
    mtp: DraftLayers
    algorithm_options: Mapping[str, Mapping[str, Any]] | None
    backend_options: Mapping[str, Any] | None
    dataset: str
    dataset_options: Mapping[str, Any] | None
    samples: int
    seq_len: int
    propagate: Propagation
    observer: ObserverName
    observer_options: Mapping[str, Any] | None
    batch_size: int | None
    sampling: Sampling
    mask: Mask
    experts: SeenExperts
    kv_cache: str | None
    use_qtorch: bool
    seed: int


@dataclass(frozen=True)
class Word:
    """A keyword of Python, which is also an option of the command line, and the key that it fills.

    ``place`` is the path of the key in a file (``calibration.samples``), "" if files have no such
    key. ``heading`` is the section of ``--help``.
    """

    key: Key
    place: str
    heading: str

    @property
    def name(self) -> str:
        """The keyword."""
        return self.key.field.word

    @property
    def param(self) -> Param:
        """The Param of the field that the keyword fills."""
        return self.key.field.param


def words() -> tuple[Word, ...]:
    """All keywords for a recipe, in the order of its fields."""
    return _WORDS


def _words(kind: type, above: str = "", heading: str = "") -> Iterator[Word]:
    for field in fields_of(kind):
        key, under = key_of(kind, field), field.param.heading or heading
        place = "" if field.param.key is None else above + key.name
        if is_dataclass(key.kind):
            yield from _words(cast("type", key.kind), f"{place}.", under)
            continue
        yield Word(key, place, under)
        parts = [cast("type", part) for part in get_args(key.kind) if is_dataclass(part)]
        for part in parts:
            for inner in fields_of(part):
                if inner.param.word:
                    yield Word(key_of(part, inner), f"{place}.{inner.name}", under)


_WORDS = tuple(_words(Recipe))


def changed(recipe: Recipe, given: RecipeWords) -> Recipe:
    """A copy of ``recipe`` with the values of the ``given`` keywords.

    Patterns are added to the recipe's patterns. Options are merged with the options of the same
    component; a different component starts without options. Raises QplugError for a wrong value,
    TypeError for an unknown keyword.
    """
    if not given:
        return recipe
    values: Mapping[str, Any] = given
    unknown = values.keys() - {word.name for word in words()}
    if unknown:
        raise TypeError(f"a recipe has no field for {', '.join(sorted(unknown))}")
    scheme = parse_scheme(given.get("scheme") or recipe.scheme, given.get("group_size"))
    calibration = recipe.calibration or Calibration()
    return replace(
        recipe,
        **_changes(recipe, {**values, "scheme": scheme}),
        calibration=replace(calibration, **_changes(calibration, values)),
        budget=replace(recipe.budget, **_changes(recipe.budget, values)),
    )


def changed_job(
    job: Job, given: RecipeWords, *, model: str | None = None, out: Path | None = None
) -> Job:
    """A copy of ``job`` with its recipe ``changed``, and with ``model`` and ``out`` if given.

    Raises QplugError for a wrong value, or if ``out`` or a backend is given and the job writes
    several folders.
    """
    recipe, exports = job.recipe, job.exports
    if out is not None or given.get("backend") or given.get("backend_options"):
        if len(exports) > 1:
            raise QplugError(
                "--out, --backend: the file names several folders to write; change them"
            )
        if not exports and out is None:
            raise QplugError("--backend needs a folder to write: give --out")
        export = exports[0] if exports else Export(out or Path())
        recipe, exports = job.recipe_for(export), (Export(out or export.out),)
    return replace(job, model=model or job.model, recipe=changed(recipe, given), exports=exports)


def _changes(owner: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The new values of fields of ``owner``: those in ``given``, and options of a new component.

    The options of a component come after the field that names the component, so ``changes`` already
    contains a new component.
    """
    changes: dict[str, Any] = {}
    for field in fields_of(type(owner)):
        value, earlier = given.get(field.word), getattr(owner, field.name)
        component = changes.get(field.param.of)
        if component is not None and component != getattr(owner, field.param.of):
            changes[field.name] = earlier = _of_another(component, field, earlier)
        if value is not None:
            spelling = field.param.spelling
            changes[field.name] = _merged(
                field, earlier, spelling.parse(value) if spelling else value
            )
    return changes


def _of_another(component: Any, field: Field, earlier: Any) -> Any:
    """The part of ``earlier`` that a new ``component`` keeps: the options of its algorithms."""
    if isinstance(component, tuple):
        return {name: options for name, options in earlier.items() if name in component}
    return field.default


def _merged(field: Field, earlier: Any, value: Any) -> Any:
    if field.param.adds:
        return (*earlier, *value)
    if isinstance(value, Mapping):
        inner = {
            key: {**earlier.get(key, {}), **own} if isinstance(own, Mapping) else own
            for key, own in value.items()
        }
        return {**earlier, **inner}
    return value
