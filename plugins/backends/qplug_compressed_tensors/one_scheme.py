"""Formats of packed integers that have one scheme in a folder: what GPTQ and AWQ share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from qplug import Format, ModelView, Scheme


class OneSchemeFormat(Format):
    """Integers in ``qweight``, ``qzeros`` and ``scales``; heads and routers stay float."""

    scales = ("scales",)
    #: The presets that the format holds, in groups of any size.
    held: ClassVar[tuple[str, ...]]
    #: What it holds, and which format has the rest, for messages.
    holds: ClassVar[str]

    def refuses(self, model: ModelView, schemes: Mapping[str, Scheme]) -> str | None:
        kinds = sorted({scheme.name for scheme in schemes.values()})
        for kind in kinds:
            if kind not in self.held:
                return f"the format holds {self.holds}, not {kind}"
        if len(kinds) > 1:
            return f"the format has one scheme in a folder, not {' and '.join(kinds)}"
        if len(set(schemes.values())) > 1:
            return "the format has one size of groups in a folder"
        for name in schemes:
            if name not in model.quantizable:
                return f"{name}: the format keeps heads and routers float"
        return None
