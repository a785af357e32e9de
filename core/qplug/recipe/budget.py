"""The budget of ``--scheme auto``: what the chosen schemes may cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from qplug.api.params import Param, check_fields
from qplug.errors import QplugError

#: How the loss by a scheme is estimated: by gradients, or by computing the model with the scheme.
Sensitivity: TypeAlias = Literal["fisher", "divergence"]

_OPTIONS = (
    "--bits 4.5 (mean bits of a weight, scales included), --size 20GB (of the folder) or "
    "--max-kl 0.02 (estimated divergence from the float model, in nats a token)"
)


@dataclass(frozen=True)
class Budget:
    """What the schemes that ``--scheme auto`` chooses may cost: one of three limits.

    Raises QplugError for a value out of bounds.
    """

    bits: Annotated[
        float | None,
        Param("--scheme auto: the mean bits of a quantizable weight, scales included.", min=0),
    ] = None
    size: Annotated[
        str | None,
        Param("--scheme auto: the largest size of the folder, such as 20GB.", metavar="SIZE"),
    ] = None
    max_kl: Annotated[
        float | None,
        Param(
            "--scheme auto: the largest estimated divergence from the float model, in nats a "
            "token.",
            min=0,
        ),
    ] = None
    sensitivity: Annotated[
        Sensitivity,
        Param(
            "--scheme auto: estimate the loss by gradients, or measure the divergence of each "
            "choice alone, which takes longer."
        ),
    ] = "fisher"

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def limits(self) -> dict[str, str]:
        """The limits that are given, as text by the option that gives each."""
        given = {"--bits": self.bits, "--size": self.size, "--max-kl": self.max_kl}
        return {
            flag: value if isinstance(value, str) else f"{value:g}"
            for flag, value in given.items()
            if value is not None
        }

    def check(self, *, is_auto: bool) -> None:
        """Raise QplugError unless there is one limit for ``--scheme auto``, none for others."""
        flags = ", ".join(self.limits)
        if not is_auto and flags:
            raise QplugError(f"{flags}: a budget goes with --scheme auto")
        if is_auto and not flags:
            raise QplugError(f"--scheme auto: needs a budget: {_OPTIONS}")
        if len(self.limits) > 1:
            raise QplugError(f"{flags}: --scheme auto takes one budget; leave the others out")
