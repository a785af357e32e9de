"""Refuses models, schemes and KV caches that an exporter cannot store, before weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qplug.api import Checkpoint, Exporter, ModelView
from qplug.api.scheme import QuantArgs, Scheme
from qplug.checkpoint.locate import find_model
from qplug.checkpoint.open import check_companions, open_checkpoint
from qplug.errors import QplugError
from qplug.machine.session import Session
from qplug.model.float_share import FloatShare, float_share
from qplug.model.kv_cache import KVCache, find_cache
from qplug.numerics.qtorch import require_qtorch
from qplug.numerics.scales import check_widths
from qplug.output.plan import Plan
from qplug.recipe.assign import matches
from qplug.recipe.recipe import Recipe


def open_source(model: str, out: Path, exporter: Exporter[Any], session: Session) -> Checkpoint:
    """Returns the checkpoint of ``model``, opened. All processes must call this together.

    Raises QplugError if ``model`` is not a checkpoint, lies in ``out``, or has files that the
    exporter cannot store.
    """
    folder = session.processes.from_first(lambda: find_model(model))
    source = open_checkpoint(folder, readers=session.registry.sources)
    check_companions(source.folder)
    if source.folder.resolve().is_relative_to(out.resolve()):
        raise QplugError(f"{out}: is or contains the model itself; choose another folder")
    file = exporter.format.single_file
    sentence = file.refuses(source.folder) if file is not None else None
    if sentence is not None:
        raise QplugError(f"{exporter.name}: {sentence}")
    return source


def servable(
    schemes: Mapping[str, Scheme], view: ModelView, exporter: Exporter[Any]
) -> dict[str, Scheme]:
    """Returns ``schemes`` with the dtype in which the exporter stores scales.

    Raises QplugError if a group does not divide the width of a linear, if qtorch is needed and not
    installed, if the exporter refuses a scheme, or if its engine builds a linear float.
    """
    if exporter.engine is not None:
        for name, why in exporter.built_float(view).items():
            if name in schemes and name in view.quantizable:
                raise QplugError(
                    f"{exporter.name}: {name}: {' and '.join(why.engines)} build it without "
                    f"quantization ({why.reason}); leave it out of --override"
                )
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


def stays_float(
    recipe: Recipe, view: ModelView, schemes: Mapping[str, Scheme], exporter: Exporter[Any]
) -> FloatShare:
    """Returns the share of the weights in decoder blocks that stays float.

    Raises QplugError if qplug cannot quantize a large share that the user did not ignore by name.
    """
    floats = exporter.built_float(view)
    share = float_share(
        view,
        schemes,
        lambda name: name in floats or any(matches(pattern, name) for pattern in recipe.ignore),
    )
    sentence = share.refusal()
    if sentence is not None and not exporter.format.stores_float:
        raise QplugError(sentence)
    return share


def refuse_unplanned(plan: Plan, schemes: Mapping[str, Scheme]) -> None:
    """Raises QplugError if a linear in ``schemes`` is in no step of ``plan``."""
    in_plan = {name for step in plan.steps for name in step.linears}
    missing = next((name for name in schemes if name not in in_plan), None)
    if missing is not None:
        raise QplugError(
            f"{missing}: the checkpoint has no tensor of this name, though the architecture has "
            f"such a linear; leave it float with --ignore '{missing}'"
        )


def servable_cache(
    args: QuantArgs | None,
    source: Checkpoint,
    view: ModelView,
    exporter: Exporter[Any],
    session: Session,
) -> KVCache | None:
    """Returns the modules that fill the KV cache; None if ``args`` is None.

    Raises QplugError if the exporter cannot store the scales of such a cache.
    """
    if args is None:
        return None
    sentence = exporter.refuses_cache(args)
    if sentence is not None:
        raise QplugError(f"--kv-cache: {exporter.name}: {sentence}")
    return find_cache(source, view, args, trust_remote_code=session.trust_remote_code)
