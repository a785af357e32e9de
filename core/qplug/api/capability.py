"""What engines run, as data: the kernel of each scheme on each device, by release."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from qplug.errors import QplugError

#: What stands for the newest release of an engine where a version is asked for.
NEWEST = "newest"

#: What ``kernel`` says where inputs are not rounded although the scheme rounds them.
INPUTS_STAY = "inputs stay as they are"
#: What ``kernel`` says where inputs are rounded although the scheme rounds none, or rounds less.
INPUTS_ROUNDED = "inputs are rounded"


@dataclass(frozen=True)
class Capability:
    """One row of what an engine serves: data, so that it can be printed and documented.

    ``scheme``: a preset's name. ``kernel``: what runs it, or why it does not run if ``served`` is
    false. ``group_sizes``: those the kernel takes, -1 for one scale a row; empty where the scheme
    has none to choose. ``out_multiple``, ``in_multiple``: what the sides of a weight, or of each
    process's part of it, must divide by. ``evidence``: ``run`` and where and when, or ``not
    run`` and what it was read from. ``devices``: names of ``qplug.DEVICES``. ``engine``: the
    release (``vLLM 0.26.0``), which ``rows_of`` fills in.
    """

    scheme: str
    kernel: str
    served: bool = True
    group_sizes: tuple[int, ...] = ()
    out_multiple: int = 1
    in_multiple: int = 1
    evidence: str = ""
    devices: tuple[str, ...] = ()
    engine: str = ""

    @property
    def emulated(self) -> bool:
        """Whether the kernel multiplies with inputs that are not rounded, though the scheme is."""
        return self.served and INPUTS_STAY in self.kernel

    @property
    def rounds_inputs(self) -> bool:
        """Whether the kernel rounds inputs otherwise than the scheme says."""
        return self.served and INPUTS_ROUNDED in self.kernel


#: Rows by release, an engine's name and its version (``vLLM 0.26.0``), the newest of a name first.
Releases: TypeAlias = Mapping[str, Sequence[Capability]]


def releases_at(releases: Collection[str], version: str = NEWEST) -> dict[str, list[str]]:
    """The releases up to ``version``, the newest first, by the name of the engine.

    ``version`` is the number of a release, or the beginning of numbers (``0.26``), of which the
    newest counts. Engines without such a release are left out. Raises QplugError if all are.
    """
    found: dict[str, list[str]] = {}
    for release in releases:
        name, number = _name_and_version(release)
        if name in found or version in (NEWEST, number) or number.startswith(f"{version}."):
            found.setdefault(name, []).append(release)
    if not found and version != NEWEST:
        known = ", ".join(releases) or "none"
        raise QplugError(f"no table for version {version!r} of the engine; there are: {known}")
    return found


def rows_of(releases: Releases, version: str = NEWEST) -> list[Capability]:
    """The rows that hold for ``version``: what a release leaves out, the next older one tells.

    A release tells of a scheme on a device where it has a row for both. Rows of one scheme stand
    together, those for CPUs last. Raises QplugError if no release has this version.
    """
    rows: list[Capability] = []
    held = releases_at(releases, version)
    for names in held.values():
        covered: set[tuple[str, str]] = set()
        for release in names:
            table = releases[release]
            left = [(row, [cell for cell in _cells(row) if cell not in covered]) for row in table]
            for row, cells in left:
                devices = tuple(device for _, device in cells if device)
                if cells:
                    rows.append(replace(row, devices=devices, engine=release))
                covered.update(cells)
    schemes = list(dict.fromkeys(row.scheme for row in rows))
    names = list(held)

    def place(row: Capability) -> tuple[int, int, bool]:
        name = names.index(_name_and_version(row.engine)[0])
        return schemes.index(row.scheme), name, "cpu" in row.devices

    return sorted(rows, key=place)


def _name_and_version(release: str) -> tuple[str, str]:
    """``vLLM 0.26.0`` as its two parts; the version is empty if there is none."""
    name, _, version = release.rpartition(" ")
    return (name, version) if name else (release, "")


def _cells(row: Capability) -> list[tuple[str, str]]:
    """The pairs of scheme and device that ``row`` tells of."""
    return [(row.scheme, device) for device in row.devices or ("",)]
