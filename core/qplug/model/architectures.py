"""The view of a checkpoint, from a plugin that knows the architecture or from the module tree.

A plugin teaches an architecture through the hook ``qplug_model_view``. Its view is compared with
the checkpoint, so that a mistake is an error that names the plugin, not a folder that no engine
loads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from qplug.api import BuiltFloat, ModelView, Towers
from qplug.api.tensors import FLOAT_DTYPES, Checkpoint
from qplug.checkpoint.names import block_of, natural_order, split_name
from qplug.errors import PluginError, QplugError
from qplug.model.draft_layers import with_drafts
from qplug.model.kept_float import built_float
from qplug.model.known_towers import with_known
from qplug.model.plain_models import plain_tree
from qplug.model.skeleton import Skeleton
from qplug.model.small_copy import SmallCopy
from qplug.model.stacked_experts import experts_apart
from qplug.model.tower_writers import tower_faults
from qplug.model.transposed import seen_as_linears
from qplug.model.view import float_tensors, model_view, packed_view, refuse_quantized
from qplug.registry.border import is_ctrl_c
from qplug.registry.plugin import Plugin
from qplug.registry.registry import Registry

_NOT_TAUGHT = BuiltFloat("the plugin that teaches the architecture leaves it float")


def find_view(
    checkpoint: Checkpoint, registry: Registry, skeleton: Skeleton | None = None
) -> ModelView:
    """The view of a float checkpoint, whose ``skeleton`` may be made already.

    Raises QplugError as ``model_view`` does, or if a plugin's view does not fit the checkpoint.
    """
    taught = _taught_view(checkpoint, registry)
    if taught is None:
        view = _with_additions(model_view(checkpoint, skeleton), checkpoint, registry)
        return with_drafts(with_other_weights(view, checkpoint))
    plugin, view = taught
    refuse_quantized(checkpoint)
    for name, shape in view.linears.items():
        stored = checkpoint.tensors.get(f"{name}.weight")
        if stored is None or stored.spec.shape != tuple(shape):
            state = "is not there" if stored is None else f"is {list(stored.spec.shape)}"
            raise _mismatch(plugin, f"{name}.weight should be {list(shape)}, but {state}")
        if stored.spec.dtype not in FLOAT_DTYPES:
            raise QplugError(
                f"{checkpoint.folder}: {name}.weight is {stored.spec.dtype}; qplug quantizes "
                f"models in {', '.join(FLOAT_DTYPES)}"
            )
    return with_drafts(with_other_weights(view, checkpoint))


def is_known_without_code(checkpoint: Checkpoint, registry: Registry) -> bool:
    """Whether the view of ``checkpoint`` is found without the code of transformers."""
    return _taught_view(checkpoint, registry) is not None or plain_tree(checkpoint) is not None


def by_linear(
    checkpoint: Checkpoint, registry: Registry, skeleton: Skeleton | None = None
) -> Checkpoint:
    """Returns ``checkpoint`` with a matrix ``[out, in]`` for each linear, also of each expert.

    ``skeleton``: of the checkpoint, if it is made already. Transposed matrices are turned as they
    are read, and tensors that hold all experts of a layer are cut. Other checkpoints, and
    architectures that a plugin teaches, stay as they are. Raises QplugError if the architecture is
    unknown.
    """
    if is_known_without_code(checkpoint, registry):
        return checkpoint
    skeleton = skeleton or Skeleton(checkpoint.folder)
    checkpoint = seen_as_linears(skeleton.model(), checkpoint)
    may_be_stacked = any(
        len(tensor.spec.shape) == 3 and min(tensor.spec.shape[1:]) > 1
        for tensor in checkpoint.tensors.values()
    )
    if not may_be_stacked:
        return checkpoint
    return experts_apart(skeleton.model(), skeleton.names(checkpoint.tensors), checkpoint)


def with_turned_matrices(
    checkpoint: Checkpoint, registry: Registry, skeleton: Skeleton
) -> Checkpoint:
    """Returns ``checkpoint``, float or not, with ``[out, in]`` for matrices stored ``[in, out]``.

    ``skeleton``: of the checkpoint. Architectures that a plugin teaches stay as they are.
    """
    if _taught_view(checkpoint, registry) is not None:
        return checkpoint
    return seen_as_linears(skeleton.model(), checkpoint)


def find_packed_view(
    checkpoint: Checkpoint,
    packed: Mapping[str, tuple[int, int]],
    registry: Registry,
    skeleton: Skeleton,
) -> ModelView:
    """The view of a folder that holds the linears in ``packed`` as codes.

    ``packed``: shapes ``(out, in)`` by linear. ``skeleton``: of the folder. Raises QplugError if a
    plugin's view has faults.
    """
    taught = _taught_view(checkpoint, registry)
    if taught is None:
        view = _with_additions(packed_view(checkpoint, packed, skeleton), checkpoint, registry)
    else:
        view = taught[1]
    return with_drafts(with_other_weights(view, checkpoint))


def expected_tensors(
    checkpoint: Checkpoint,
    stored: Collection[str],
    registry: Registry,
    *,
    trust_remote_code: bool = False,
) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors that a float checkpoint of this architecture has, by name on disk.

    ``stored``: the names of the tensors in ``checkpoint`` if its codes were float weights. For an
    architecture that a plugin teaches: the weights of its linears only.
    """
    taught = _taught_view(checkpoint, registry)
    if taught is None:
        return float_tensors(checkpoint, stored, trust_remote_code=trust_remote_code)
    return {f"{name}.weight": shape for name, shape in taught[1].linears.items()}


def with_other_weights(view: ModelView, checkpoint: Checkpoint) -> ModelView:
    """Returns ``view`` with the float weights in its blocks that are none of its linears."""
    others = {}
    for tensor, stored in checkpoint.tensors.items():
        module, local = split_name(tensor)
        name = module if local == "weight" else tensor
        is_weight = len(stored.spec.shape) > 1 and not local.endswith("bias")
        if is_weight and stored.spec.dtype in FLOAT_DTYPES and module not in view.linears:
            others[name] = stored.spec.shape
    inside = [name for name in natural_order(others) if block_of(name, view.blocks) is not None]
    floats = {**built_float(inside, view.config), **view.built_float}
    return replace(view, built_float=floats, other_weights={name: others[name] for name in inside})


def _taught_view(checkpoint: Checkpoint, registry: Registry) -> tuple[Plugin, ModelView] | None:
    """The first plugin that describes the architecture, and its view; None if no plugin does."""
    answer = _answer(checkpoint, registry)
    if answer is None or _only_adds(answer[1]):
        return None
    plugin, view = answer
    kept = dict.fromkeys(view.linears.keys() - view.quantizable, _NOT_TAUGHT)
    return plugin, replace(
        view,
        config=checkpoint.config,
        built_float={**kept, **view.built_float},
        towers=with_known(view.towers, checkpoint.config),
    )


def _with_additions(view: ModelView, checkpoint: Checkpoint, registry: Registry) -> ModelView:
    """Returns ``view``, as qplug finds it of ``checkpoint``, with what a plugin adds to it."""
    answer = _answer(checkpoint, registry)
    if answer is None:
        return view
    plugin, more = answer
    for name in more.built_float:
        if name not in view.linears and not {name, f"{name}.weight"} & checkpoint.tensors.keys():
            raise _mismatch(plugin, f"{name} is in built_float, but the model has no such weight")
    floats = {name for name, why in more.built_float.items() if not why.engines}
    return replace(
        view,
        quantizable=view.quantizable - floats,
        built_float={**view.built_float, **more.built_float},
        towers=with_known(more.towers, checkpoint.config),
    )


def refuse_towers(checkpoint: Checkpoint, registry: Registry, copy: SmallCopy) -> None:
    """Raises QplugError if towers that a plugin names are not those of ``copy``.

    ``copy``: a small copy of the model in ``checkpoint``. The towers of qplug's own table are not
    tried: a model may have some of a row's parts alone.
    """
    answer = _answer(checkpoint, registry)
    if answer is None or not answer[1].towers:
        return
    plugin, view = answer
    for sentence in tower_faults(view.towers, copy):
        raise _mismatch(plugin, f"towers: {sentence}")


def _answer(checkpoint: Checkpoint, registry: Registry) -> tuple[Plugin, ModelView] | None:
    """The first plugin that says something of the model, and what it says; None if none does."""
    for plugin, call in registry.implementing("qplug_model_view"):
        try:
            view = call(config=checkpoint.config)
        except BaseException as error:  # a plugin may raise anything
            if is_ctrl_c(error):
                raise
            raise PluginError(plugin.name, plugin.source, error) from error
        if view is None:
            continue
        for sentence in _faults(view):
            raise _mismatch(plugin, sentence)
        return plugin, view
    return None


def _only_adds(view: ModelView) -> bool:
    """Whether ``view`` describes no model, and adds to what qplug finds itself."""
    return not (view.linears or view.blocks) and bool(view.built_float or view.towers)


def _faults(view: object) -> Iterator[str]:
    """Yields what is wrong with a view by itself."""
    if not isinstance(view, ModelView):
        yield f"it must return a ModelView or None, not {view!r}"
        return
    if not (view.blocks or _only_adds(view)):
        yield "it names no blocks"
    for name in sorted(view.quantizable - set(view.linears)):
        yield f"{name} is in quantizable, but not in linears"
    for name in sorted(view.quantizable):
        if not name.startswith(tuple(f"{block}." for block in view.blocks)):
            yield f"{name} is in quantizable, but in none of its blocks"
    for name, why in view.built_float.items():
        if name in view.quantizable and not why.engines:
            yield f"{name} is in quantizable, but also in built_float for all engines"
    for towers in view.towers:
        if not (isinstance(towers, Towers) and towers.parts):
            yield f"towers has {towers!r}, not Towers of one part or more"
        elif pattern := next((each for each in towers.writers if each.count("#") > 1), None):
            yield f"towers: {pattern} has more than one #"


def _mismatch(plugin: Plugin, sentence: str) -> QplugError:
    return QplugError(f"plugin {plugin}: qplug_model_view: {sentence}")
