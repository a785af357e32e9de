"""What an engine is: which folders it loads, with which kernels, and how it is started."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from qplug.api.capability import NEWEST, Capability, Releases, releases_at, rows_of
from qplug.api.format import Format
from qplug.api.layout import Problem, kernel_problems
from qplug.api.limits import Target, beyond_limits, too_narrow
from qplug.api.model import ModelView
from qplug.api.scheme import QuantArgs, Scheme
from qplug.api.tensors import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self


@dataclass(frozen=True)
class Server:
    """How an engine's server of OpenAI's API is started: ``python -m MODULE FOLDER_OPTION DIR``.

    ``package``: what can be imported where the engine is installed; ``distributions``: the names
    under which it may be installed, by default that of the package. ``brief``: options for a server
    that answers a few prompts and ends: it starts faster, and computes every token anew.
    ``processes_option`` and ``context_option`` set how many GPUs share the model, and the longest
    request in tokens; they are empty if the server has no such option.
    """

    package: str
    module: str
    folder_option: str
    brief: tuple[str, ...] = ()
    processes_option: str = ""
    context_option: str = ""
    distributions: tuple[str, ...] = ()


class Engine:
    """What loads folders: the limits of its kernels and of its loader, and how it is started.

    An engine is a constant, as a format is. Its methods are given the format that an exporter
    names beside it, so that one engine can load several. What it loads depends on its version:
    ``at`` returns the engine as it is in another one.
    """

    #: What each release runs. A release (``vLLM 0.26.0``) is a name and a version; several stand
    #: side by side, the newest first. Empty: nothing is known, and no kernel sets limits.
    releases: ClassVar[Releases] = {}
    #: The version whose table and rules hold; ``at`` returns an engine with another one.
    version: str = NEWEST
    #: The command that serves a folder, for the model card; ``{}`` stands for the folder.
    serve_command: ClassVar[str | None] = None
    #: How ``qplug serve`` starts the engine; None if qplug cannot.
    server: ClassVar[Server | None] = None
    #: Whether it can rotate the inputs of linears as the model runs (``Preparation.online``).
    rotates_online: ClassVar[bool] = False

    @property
    def servers(self) -> frozenset[str]:
        """The names of the servers that load folders, as in ``BuiltFloat``: those of releases."""
        return frozenset(release.partition(" ")[0] for release in self.releases)

    @property
    def held(self) -> dict[str, list[str]]:
        """The releases that count, the newest first, by the engine's name: see ``releases_at``."""
        return releases_at(self.releases, self.version)

    def at(self, version: str) -> Self:
        """Returns this engine in ``version``, with the table and the rules of that version.

        ``version``: a number (``0.26.0``) or its beginning (``0.26``), or ``newest``. Raises
        QplugError if there is no table for it.
        """
        releases_at(self.releases, version)
        other = copy(self)
        for name in [*vars(other)]:
            if isinstance(getattr(type(self), name, None), cached_property):
                del vars(other)[name]
        other.version = version
        return other

    def capabilities(self) -> list[Capability]:
        """What its version serves and what it does not, with the release in ``engine``.

        What a release does not say of a scheme on a device, the next older release says.
        """
        return list(self._table)

    @cached_property
    def _table(self) -> tuple[Capability, ...]:
        """The answer of ``capabilities``: a plan asks hundreds of times."""
        return tuple(rows_of(self.releases, self.version))

    # --- what it takes ---------------------------------------------------------------------------

    def refuses(
        self, model: ModelView, schemes: Mapping[str, Scheme], target: Target
    ) -> str | None:
        """Why the engine does not serve this model on ``target``, as a sentence; None if it does.

        ``schemes``: by linear, of those that are to be quantized. The run asks before it reads any
        weight.
        """
        return beyond_limits(self.capabilities(), model, schemes, target)

    def too_narrow(
        self, model: ModelView, schemes: Mapping[str, Scheme], target: Target
    ) -> dict[str, str]:
        """Returns why kernels do not take the shapes of linears in ``schemes``, by name.

        A run leaves these linears float, if they are few. A linear that the engine merges with such
        a linear is among them. What the engine does not serve in any shape is not: it is refused.
        """
        return too_narrow(self.capabilities(), model, schemes, target)

    def refuses_cache(self, cache: QuantArgs, model: ModelView) -> str | None:
        """Why it cannot use stored scales of the KV cache of ``model``; None if it can."""
        return None

    def check_folder(
        self, folder: Checkpoint, model: ModelView, format: Format
    ) -> Iterator[Problem]:
        """The rules of the engine's loader that ``folder``, in ``format``, breaks.

        By default: a kernel takes each linear.
        """
        config = folder.config.get("quantization_config")
        if config is not None:
            schemes = format.read_schemes(config, model)
            yield from kernel_problems(model, schemes, self.capabilities())

    # --- what it computes with -------------------------------------------------------------------

    def merged(self, names: Sequence[str]) -> list[list[str]]:
        """The groups of linears among ``names`` that the engine makes one matrix of.

        Where scales have two levels, the linears of a group get the same global scale.
        """
        return []

    def effective_weight(
        self, tensors: Mapping[str, Tensor], scheme: Scheme, format: Format
    ) -> Tensor:
        """The float32 weight ``[out, in]`` that the engine multiplies with; readers take it.

        It is the weight that stored tensors stand for, unless a kernel rounds that weight again.
        """
        return format.dequantize(tensors, scheme)

    # --- how it is started -----------------------------------------------------------------------

    def serve_arguments(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """The options that the engine needs to serve a folder with this ``config.json``."""
        return ()

    def serve_warnings(
        self, schemes: Mapping[str, Scheme], cache: QuantArgs | None
    ) -> Sequence[str]:
        """What the engine gets wrong in silence on this machine, a sentence each.

        ``schemes``: of the linears of a folder; ``cache``: how it has keys and values stored, None
        if they stay float. ``qplug serve`` and ``qplug verify --engine`` print them.
        """
        return ()
