"""Refuses models, schemes and KV caches that an exporter cannot store, before weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qplug.api import Checkpoint, Exporter, ModelView
from qplug.api.scheme import QuantArgs, Scheme
from qplug.checkpoint.locate import find_model
from qplug.checkpoint.names import kind_of, module_of
from qplug.checkpoint.open import check_companions, open_checkpoint
from qplug.errors import QplugError
from qplug.machine.session import Session
from qplug.model.float_share import FloatShare, float_share
from qplug.model.kv_cache import KVCache, find_cache
from qplug.model.skeleton import Skeleton
from qplug.numerics.qtorch import require_qtorch
from qplug.output.plan import Plan
from qplug.recipe.assign import assign, matches
from qplug.recipe.recipe import Recipe
from qplug.run.drafts import refuse_static
from qplug.run.narrow import find_narrow, refuse_narrow


def open_source(
    model: str, out: Path, exporter: Exporter[Any], session: Session
) -> tuple[Checkpoint, Skeleton]:
    """Returns the checkpoint of ``model``, opened, and its skeleton, of which nothing is built yet.

    All processes must call this together.

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
    return source, Skeleton(source.folder, trust_remote_code=session.trust_remote_code)


@dataclass(frozen=True)
class Decision:
    """What a run quantizes: ``schemes`` by linear, with the dtype in which scales are stored.

    ``narrow`` says of linears that no kernel takes, by name, why they stay float. ``share`` is the
    share of the weights that stays float.
    """

    schemes: dict[str, Scheme]
    narrow: dict[str, str]
    share: FloatShare


def decide(recipe: Recipe, view: ModelView, exporter: Exporter[Any]) -> Decision:
    """Returns what ``recipe`` quantizes of the model in ``view``.

    Raises QplugError if patterns match nothing, if nothing or too little is left to quantize, or if
    the exporter refuses it.
    """
    assigned = assign(recipe, view, exporter.built_float(view))
    refuse_built_float(assigned, view, exporter)
    _refuse_embedding(assigned, view)
    narrow = find_narrow(recipe, view, assigned, exporter)
    share = stays_float(recipe, view, assigned, exporter, narrow)
    refuse_static(assigned, view)
    wide = {name: scheme for name, scheme in assigned.items() if name not in narrow}
    return Decision(servable(wide, view, exporter), narrow, share)


def refuse_built_float(
    schemes: Mapping[str, Scheme], view: ModelView, exporter: Exporter[Any]
) -> None:
    """Raises QplugError if the engine builds a linear in ``schemes`` float."""
    if exporter.engine is not None:
        for name, why in exporter.built_float(view).items():
            if name in schemes and name in view.quantizable:
                raise QplugError(
                    f"{exporter.name}: {name}: {' and '.join(why.engines)} build it without "
                    f"quantization ({why.reason}); leave it out of --override"
                )


def _refuse_embedding(schemes: Mapping[str, Scheme], view: ModelView) -> None:
    """Raises QplugError if the embedding is quantized and tied, or its inputs are rounded."""
    for name, scheme in schemes.items():
        if name != view.embedding:
            continue
        if view.is_tied(name):
            raise QplugError(
                f"--override {name}: the head is computed with the same tensor (it is tied), so it "
                "stays float"
            )
        if scheme.activations is not None:
            raise QplugError(
                f"--override {name}: its inputs are numbers of tokens, which {scheme.name} cannot "
                "round; take a scheme of weights alone, such as W8A16"
            )


def servable(
    schemes: Mapping[str, Scheme], view: ModelView, exporter: Exporter[Any]
) -> dict[str, Scheme]:
    """Returns ``schemes`` with the dtype in which the exporter stores scales.

    Raises QplugError if qtorch is needed and not installed, or if the exporter refuses a scheme.
    """
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
    stored = {
        scheme: scheme.with_scale_dtype(exporter.format.scale_dtype(scheme, view.dtype))
        for scheme in dict.fromkeys(schemes.values())
    }
    return {name: stored[scheme] for name, scheme in schemes.items()}


def stays_float(
    recipe: Recipe,
    view: ModelView,
    assigned: Mapping[str, Scheme],
    exporter: Exporter[Any],
    narrow: Mapping[str, str],
) -> FloatShare:
    """Returns the share of the weights in decoder blocks that stays float.

    ``assigned`` has the schemes that the recipe assigns; ``narrow`` has the reasons for linears
    among them that no kernel takes. Raises QplugError if a large share that the user did not ignore
    by name stays float: qplug cannot quantize it, or no kernel takes it.
    """
    floats = exporter.built_float(view)
    coded = () if exporter.format.stores_float else assigned.keys() - narrow.keys()
    share = float_share(
        view,
        coded,
        lambda name: name in floats or any(matches(pattern, name) for pattern in recipe.ignore),
    )
    sentence = share.refusal()
    kinds = {kind_of(f"{name}.").removesuffix(".") for name in narrow}
    if sentence is not None and 2 * sum(share.unnamed.get(k, 0.0) for k in kinds) > share.silent:
        refuse_narrow(view, assigned, narrow, exporter, share)
    if sentence is not None and not exporter.format.stores_float:
        raise QplugError(sentence)
    return share


def refuse_unplanned(plan: Plan, schemes: Mapping[str, Scheme], exporter: Exporter[Any]) -> None:
    """Raises QplugError if a linear in ``schemes`` is in no step of ``plan``, or is stored wrongly.

    Engines turn every tensor whose name is that of a matrix that float checkpoints of the model
    have as ``[in, out]``, whatever it contains.
    """
    in_plan = {name for step in plan.steps for name in step.linears}
    missing = next((name for name in schemes if name not in in_plan), None)
    if missing is not None:
        raise QplugError(
            f"{missing}: the checkpoint has no tensor of this name, though the architecture has "
            f"such a linear; leave it float with --ignore '{missing}'"
        )
    turned = (name for step in plan.steps if step.linears for name in step.transposed)
    coded = next((name for name in turned if module_of(name) in schemes), None)
    if coded is not None and exporter.engine is not None:
        raise QplugError(
            f"{coded}: engines transpose it as they load it, since float checkpoints of this "
            "model store it so; take a scheme whose codes have another name, such as W4A16 or W8A16"
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
    sentence = exporter.refuses_cache(args, view)
    if sentence is not None:
        raise QplugError(f"--kv-cache: {exporter.name}: {sentence}")
    return find_cache(source, view, args, trust_remote_code=session.trust_remote_code)
