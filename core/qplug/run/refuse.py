"""What a run refuses before any weight is read: files, schemes and caches that cannot be served."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qplug.api import Checkpoint, Exporter, ModelView
from qplug.api.scheme import QuantArgs, Scheme
from qplug.checkpoint.locate import find_model
from qplug.checkpoint.open import open_checkpoint
from qplug.errors import QplugError
from qplug.machine.session import Session
from qplug.model.kv_cache import KVCache, find_cache
from qplug.numerics.qtorch import require_qtorch
from qplug.numerics.scales import check_widths


def open_source(model: str, out: Path, exporter: Exporter[Any], session: Session) -> Checkpoint:
    """Open the checkpoint of ``model``. All processes must ask.

    Raises QplugError if it is no checkpoint, lies in ``out``, or has files that the exporter
    cannot store.
    """
    source = open_checkpoint(session.processes.from_first(lambda: find_model(model)))
    if source.folder.resolve().is_relative_to(out.resolve()):
        raise QplugError(f"{out}: is or holds the model itself; choose another folder")
    file = exporter.format.single_file
    sentence = file.refuses(source.folder) if file is not None else None
    if sentence is not None:
        raise QplugError(f"{exporter.name}: {sentence}")
    return source


def servable(
    schemes: Mapping[str, Scheme], view: ModelView, exporter: Exporter[Any]
) -> dict[str, Scheme]:
    """Give the schemes of linears the dtype in which the exporter stores scales.

    Raises QplugError if a group does not divide the width of a linear, or the exporter refuses.
    """
    for name, scheme in schemes.items():
        check_widths(name, view.linears[name][1], scheme)
    if any(scheme.uses_qtorch for scheme in schemes.values()):
        if exporter.engine is not None:
            raise QplugError(
                f"{exporter.name}: use_qtorch: engines do not round as qtorch does; "
                "measure it with --backend fake"
            )
        require_qtorch()
    sentence = exporter.refuses(view, schemes)
    if sentence is not None:
        raise QplugError(f"{exporter.name}: {sentence}")
    return {
        name: scheme.with_scale_dtype(exporter.format.scale_dtype(scheme, view.dtype))
        for name, scheme in schemes.items()
    }


def servable_cache(
    args: QuantArgs | None,
    source: Checkpoint,
    view: ModelView,
    exporter: Exporter[Any],
    session: Session,
) -> KVCache | None:
    """Find the modules that fill the KV cache; None if no scales are to be stored for one.

    Raises QplugError if the exporter refuses to store them.
    """
    if args is None:
        return None
    sentence = exporter.refuses_cache(args)
    if sentence is not None:
        raise QplugError(f"--kv-cache: {exporter.name}: {sentence}")
    return find_cache(source, view, args, trust_remote_code=session.trust_remote_code)
