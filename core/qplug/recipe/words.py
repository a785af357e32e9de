"""What is said on the command line and in Python: the words for a recipe, and what they change."""

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
    from qplug.recipe.recipe import ObserverName, Propagation, Sampling


class RecipeWords(TypedDict, total=False):
    """The keywords of ``qplug.quantize`` that make a recipe; a test compares them with ``words``.

    ``algo`` is one algorithm or several (``"awq+gptq"``). ``group_size`` replaces the group size of
    ``scheme``. ``overrides`` maps patterns of module names to schemes. None says nothing.
    """

    algo: str
    scheme: str | Scheme
    group_size: int | None
    backend: str
    overrides: Mapping[str, str | Scheme] | None
    ignore: Sequence[str]
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
    kv_cache: str | None
    use_qtorch: bool
    seed: int


@dataclass(frozen=True)
class Word:
    """A keyword and option that fills ``key``.

    ``place`` is where it stands in a file, "" for nowhere.
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
        return self.key.field.param


def words() -> tuple[Word, ...]:
    """All words for a recipe, in the order of its fields."""
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


def changed(recipe: Recipe, said: RecipeWords) -> Recipe:
    """``recipe`` with all that is ``said`` in place of what it has.

    Patterns are added to those of the recipe. Options are merged with those of the same component;
    another component starts without any. Raises QplugError for a wrong value, TypeError for a word
    that there is not.
    """
    if not said:
        return recipe
    values: Mapping[str, Any] = said
    unknown = values.keys() - {word.name for word in words()}
    if unknown:
        raise TypeError(f"a recipe has no field for {', '.join(sorted(unknown))}")
    scheme = parse_scheme(said.get("scheme") or recipe.scheme, said.get("group_size"))
    calibration = recipe.calibration or Calibration()
    return replace(
        recipe,
        **_changes(recipe, {**values, "scheme": scheme}),
        calibration=replace(calibration, **_changes(calibration, values)),
    )


def changed_job(
    job: Job, said: RecipeWords, *, model: str | None = None, out: Path | None = None
) -> Job:
    """``job`` with another model or folder if one is given, and its recipe ``changed``.

    Raises QplugError as ``changed``, and if it is not clear which folder is meant.
    """
    recipe, exports = job.recipe, job.exports
    if out is not None or said.get("backend") or said.get("backend_options"):
        if len(exports) > 1:
            raise QplugError(
                "--out, --backend: the file names several folders to write; change them"
            )
        if not exports and out is None:
            raise QplugError("--backend: say with --out where to write")
        export = exports[0] if exports else Export(out or Path())
        recipe, exports = job.recipe_for(export), (Export(out or export.out),)
    return replace(job, model=model or job.model, recipe=changed(recipe, said), exports=exports)


def _changes(owner: Any, said: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``owner`` that words are said for, and those that belong to another component.

    A field stands behind the one that names its component.
    """
    changes: dict[str, Any] = {}
    for field in fields_of(type(owner)):
        value, earlier = said.get(field.word), getattr(owner, field.name)
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
    """What of ``earlier`` means something to another component: to algorithms, their options."""
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
