"""How files and the command line write pipelines, schemes, overrides and KV caches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

from qplug.api.params import Param, Spelling
from qplug.api.scheme import CACHES, PRESETS, QuantArgs, Scheme, Strategy, preset
from qplug.errors import QplugError, did_you_mean
from qplug.recipe.spelled_scheme import spelled

#: Options of a component, by name.
Options: TypeAlias = Mapping[str, str | int | float | bool | None]

#: The names of ``CACHES``.
CacheName: TypeAlias = Literal["fp8", "fp8_per_head"]


@dataclass(frozen=True)
class ArgsPart:
    """Weights or inputs in a scheme that a file spells out."""

    dtype: Annotated[str, Param("int2 to int8, or a float format such as e4m3 or e5m2.")]
    strategy: Annotated[Strategy, Param("Which numbers share a scale.")]
    group_size: Annotated[int | None, Param("Columns in a group, for strategy group.")] = None
    block: Annotated[
        tuple[int, ...] | None, Param("Rows and columns of a block, for strategy block.")
    ] = None
    symmetric: Annotated[bool, Param("No zero point.")] = True
    dynamic: Annotated[bool, Param("The engine computes the scales as it runs.")] = False

    def args(self) -> QuantArgs:
        """The QuantArgs with these values. Raises QplugError if they contradict each other."""
        block = None if self.block is None else (self.block[0], self.block[-1])
        return QuantArgs(
            self.dtype, self.strategy, self.group_size, block, self.symmetric, self.dynamic
        )

    @classmethod
    def of(cls, args: QuantArgs) -> ArgsPart:
        """The part of a file that ``args`` reads back."""
        return cls(
            args.dtype, args.strategy, args.group_size, args.block, args.symmetric, args.dynamic
        )


@dataclass(frozen=True)
class SchemePart:
    """A scheme in a file: a ``preset`` with an optional ``group_size``, or ``weights``."""

    preset: Annotated[str | None, Param("A scheme's name: see qplug schemes.")] = None
    group_size: Annotated[
        int | None, Param("Columns that share a scale; -1 is a whole row.", word="group_size")
    ] = None
    weights: Annotated[ArgsPart | None, Param("How to store weights.")] = None
    activations: Annotated[
        ArgsPart | None, Param("How to round inputs; without it they stay float.")
    ] = None

    def scheme(self) -> Scheme:
        """The scheme with these values. Raises QplugError if they contradict each other."""
        if (self.preset is None) == (self.weights is None):
            raise QplugError("a scheme needs either preset or weights")
        if self.preset is not None:
            if self.activations is not None:
                raise QplugError("a preset already decides the activations; remove activations")
            return parse_scheme(self.preset, self.group_size)
        assert self.weights is not None
        if self.group_size is not None:
            raise QplugError("group_size goes with preset; move it into weights")
        return spelled(self.weights.args(), self.activations.args() if self.activations else None)


@dataclass(frozen=True)
class Step:
    """An algorithm with options in a file's pipeline."""

    algorithm: Annotated[str, Param("See qplug plugins list.")]
    options: Annotated[Options, Param("See qplug plugins show ALGORITHM.")] = field(
        default_factory=dict
    )


# --- pipelines ------------------------------------------------------------------------------------


def parse_algorithms(text: str) -> tuple[str, ...]:
    """The names in ``"quarot+gptq"``, in order. Raises QplugError for an empty or repeated name."""
    names = tuple(part.strip() for part in text.split("+"))
    if not all(names) or len(set(names)) < len(names):
        raise QplugError(f"--algo {text}: name one algorithm, or several as in quarot+gptq")
    return names


def _read_pipeline(pipeline: tuple[str | Step, ...]) -> Mapping[str, Any]:
    steps = [Step(step) if isinstance(step, str) else step for step in pipeline]
    return {
        "algorithms": parse_algorithms("+".join(step.algorithm for step in steps)),
        "algorithm_options": {step.algorithm: step.options for step in steps if step.options},
    }


def _write_pipeline(recipe: Any) -> tuple[str | Step, ...]:
    options = recipe.algorithm_options
    return tuple(
        Step(name, options[name]) if options.get(name) else name for name in recipe.algorithms
    )


PIPELINE = Spelling(
    tuple[str | Step, ...], read=_read_pipeline, write=_write_pipeline, parse=parse_algorithms
)


# --- schemes --------------------------------------------------------------------------------------

#: Stands for the scheme of a recipe that leaves the choice of schemes to a search.
AUTO = Scheme("auto", QuantArgs("int8", "channel"))


def parse_scheme(name: str | Scheme, group_size: int | None = None) -> Scheme:
    """The scheme called ``name`` (or ``name`` itself, if it is a Scheme) with ``group_size``.

    Without ``group_size`` the scheme keeps its own. ``auto`` is ``AUTO``. Raises QplugError for an
    unknown name, or if the scheme cannot have this group size.
    """
    scheme = AUTO if name == AUTO.name else preset(name) if isinstance(name, str) else name
    if scheme == AUTO and group_size is not None:
        raise QplugError("--group-size: --scheme auto chooses the sizes of groups; leave it out")
    return scheme if group_size is None else scheme.with_group_size(group_size)


def _read_scheme(part: str | SchemePart) -> Mapping[str, Scheme]:
    return {"scheme": parse_scheme(part) if isinstance(part, str) else part.scheme()}


def _write_scheme(owner: Any) -> str | SchemePart:
    scheme: Scheme = owner.scheme
    if scheme == AUTO:
        return AUTO.name
    named = PRESETS.get(scheme.name)
    if named is None:
        try:
            named = preset(scheme.name)
        except QplugError:
            named = None
    if named == scheme:
        return scheme.name
    size = scheme.weights.group_size or -1
    try:
        if named is not None and named.with_group_size(size) == scheme:
            return SchemePart(preset=scheme.name, group_size=size)
    except QplugError:
        pass  # the scheme has no group size to choose
    inputs = scheme.activations
    return SchemePart(
        weights=ArgsPart.of(scheme.weights),
        activations=None if inputs is None else ArgsPart.of(inputs),
    )


SCHEME = Spelling(str | SchemePart, read=_read_scheme, write=_write_scheme, parse=parse_scheme)


# --- exceptions -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class OverridePart:
    """An override in a file: a pattern of module names, and the scheme of matching layers."""

    pattern: Annotated[str, Param("A glob over module names, or re: and a regular expression.")]
    scheme: Annotated[Scheme, Param("The scheme of these layers.", spelling=SCHEME)]


def _parse_overrides(schemes: Mapping[str, str | Scheme]) -> tuple[tuple[str, Scheme], ...]:
    return tuple((pattern, parse_scheme(scheme)) for pattern, scheme in schemes.items())


OVERRIDES = Spelling(
    tuple[OverridePart, ...],
    read=lambda parts: {"overrides": tuple((part.pattern, part.scheme) for part in parts)},
    write=lambda recipe: tuple(OverridePart(*override) for override in recipe.overrides),
    parse=_parse_overrides,
)


# --- caches ---------------------------------------------------------------------------------------


def parse_cache(name: str | None) -> QuantArgs | None:
    """How the KV cache format called ``name`` stores numbers; None if ``name`` is None.

    Raises QplugError for an unknown name.
    """
    if name is None:
        return None
    if name not in CACHES:
        hint = did_you_mean(name, CACHES)
        names = f"{', '.join(CACHES)}{hint and '.' + hint}"
        raise QplugError(f"--kv-cache {name}: must be one of {names}")
    return CACHES[name]


CACHE = Spelling(
    CacheName | None,
    read=lambda name: {"kv_cache": parse_cache(name)},
    write=lambda recipe: next((n for n, args in CACHES.items() if args == recipe.kv_cache), None),
    parse=parse_cache,
)
