"""The base class of GPTQ and AWQ: packed integers with one scheme for a whole folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from qplug import Format, ModelView, Scheme


class OneSchemeFormat(Format):
    """Stores integers in ``qweight``, ``qzeros`` and ``scales``; heads and routers stay float."""

    scales = ("scales",)
    #: The presets that the format can store, in groups of any size.
    presets: ClassVar[tuple[str, ...]]
    #: What the format can store, and what to use instead, in words for messages.
    stores: ClassVar[str]

    def refuses(self, model: ModelView, schemes: Mapping[str, Scheme]) -> str | None:
        kinds = sorted({scheme.name for scheme in schemes.values()})
        for kind in kinds:
            if kind not in self.presets:
                return f"the format stores {self.stores}, not {kind}"
        if len(kinds) > 1:
            return f"the format has one scheme in a folder, not {' and '.join(kinds)}"
        if len(set(schemes.values())) > 1:
            return "the format has one group size in a folder; use one for all layers"
        for name in schemes:
            if name not in model.quantizable:
                return f"{name}: the format keeps heads and routers float"
        return None
