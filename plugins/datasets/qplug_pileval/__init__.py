"""The validation split of The Pile: prose, code, papers, mail and more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qplug import Dataset, hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable


@hookimpl
def qplug_datasets() -> Iterable[type[Dataset[Any]]]:
    from qplug_pileval.pile import PileVal

    return [PileVal]
