"""What an exporter is: the format of a folder, and the engine that loads it, under a name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from qplug.api.capability import NEWEST
from qplug.api.component import Component, P
from qplug.api.engine import Engine
from qplug.api.format import Format
from qplug.api.layout import Problem
from qplug.api.limits import Target
from qplug.api.model import BuiltFloat, ModelView
from qplug.api.scheme import QuantArgs, Scheme
from qplug.api.tensors import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor


class Exporter(Component[P]):
    """A format and the engine that loads it, under the name that users give as ``--backend``.

    It packs codes, and never computes one. It names the two; its methods ask both.
    """

    #: How tensors are stored.
    format: Format
    #: What loads the folder; None where no engine computes with it, but qplug's own reader alone.
    #: Floats may then be rounded as no engine rounds them (``use_qtorch``).
    engine: Engine | None = None

    def __init__(self, params: P) -> None:
        """Takes the engine in the version that the options name.

        Raises QplugError if the engine has no table for it.
        """
        super().__init__(params)
        if self.engine is not None and self.target.engine != NEWEST:
            self.engine = self.engine.at(self.target.engine)

    @property
    def target(self) -> Target:
        """Where the folder is to be served: the options, if ``Params`` are a ``Target``."""
        return self.params if isinstance(self.params, Target) else Target()

    def refuses(self, model: ModelView, schemes: Mapping[str, Scheme]) -> str | None:
        """Why the format cannot store this model, or the engine not serve it; None if they can."""
        sentence = self.format.refuses(model, schemes)
        if sentence is None and self.engine is not None:
            sentence = self.engine.refuses(model, schemes, self.target)
        return sentence

    def too_narrow(self, model: ModelView, schemes: Mapping[str, Scheme]) -> dict[str, str]:
        """Returns why kernels do not take linears, by name: see ``Engine.too_narrow``."""
        return {} if self.engine is None else self.engine.too_narrow(model, schemes, self.target)

    def refuses_cache(self, cache: QuantArgs, model: ModelView) -> str | None:
        """Why scales of a KV cache cannot be stored, or would not be used; None if they can."""
        sentence = self.format.refuses_cache(cache)
        if sentence is None and self.engine is not None:
            sentence = self.engine.refuses_cache(cache, model)
        return sentence

    def built_float(self, model: ModelView) -> dict[str, BuiltFloat]:
        """Why weights of ``model`` stay float, by name: the engine builds them so.

        Without an engine: those that any engine builds so, since a measured folder has to show what
        an engine would serve.
        """
        if self.engine is None:
            return dict(model.built_float)
        servers = self.engine.servers
        return {
            name: why
            for name, why in model.built_float.items()
            if not why.engines or servers & {*why.engines}
        }

    def merged(self, names: Sequence[str]) -> list[list[str]]:
        """The groups of linears that share a global scale: see ``Engine.merged``."""
        return [] if self.engine is None else self.engine.merged(names)

    def effective_weight(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
        """The float32 weight ``[out, in]`` that the engine, or qplug's reader, multiplies with."""
        if self.engine is None:
            return self.format.dequantize(tensors, scheme)
        return self.engine.effective_weight(tensors, scheme, self.format)

    def check_folder(self, folder: Checkpoint, model: ModelView) -> Iterator[Problem]:
        """The rules of the format, then of the engine's loader, that ``folder`` breaks."""
        yield from self.format.check_folder(folder, model)
        if self.engine is not None:
            yield from self.engine.check_folder(folder, model, self.format)
