"""Keys and values on their way into the KV cache: which modules store them, their ranges, rounding.

Attention passes keys and values, after rotary embedding, to ``update(keys, values, layer, ...)`` of
a cache that it is called with: the interface of transformers' caches. The classes here take the
place of such a cache, so no architecture is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from qplug.api import ModelView
from qplug.api.scheme import QuantArgs
from qplug.api.tensors import Checkpoint, TensorSpec
from qplug.errors import QplugError
from qplug.model.hollow import build, load_config
from qplug.model.hooks import hooked
from qplug.model.on_disk import blocks_by_name
from qplug.numerics.activations import fake_quantize_activations, input_scale

#: The names of the scales of keys and values, float32 ``[1]``, in a module of attention.
SCALES = ("k_scale", "v_scale")

#: Those that folders of others have: engines round queries too, under the last of them.
STORED_SCALES = (*SCALES, "q_scale")

#: Tokens on which the modules that fill the cache are found.
_PROBE = 4


@dataclass(frozen=True)
class KVCache:
    """How keys and values are stored, and which modules store them.

    ``modules``: the module of each block that fills the cache, relative to the block, by block.
    ``argument``: the name of the argument through which blocks get their cache. ``heads``: the
    numbers of heads of keys and values, and of queries, if each has a scale of its own.
    """

    args: QuantArgs
    modules: Mapping[str, str]
    argument: str
    heads: tuple[int, int] | None = None

    @property
    def scales(self) -> dict[str, TensorSpec]:
        """The scales of a module that fills the cache, by local name.

        Scales of heads have two axes more, as compressed-tensors has them.
        """
        if self.heads is None:
            return dict.fromkeys(SCALES, TensorSpec("float32", (1,)))
        own, queries = (TensorSpec("float32", (count, 1, 1)) for count in self.heads)
        return {**dict.fromkeys(SCALES, own), STORED_SCALES[-1]: queries}

    def scale_specs(self, block: str) -> dict[str, TensorSpec]:
        """The scales of ``block``, by full name."""
        return {f"{block}.{self.modules[block]}.{n}": spec for n, spec in self.scales.items()}


class PassingCache:
    """A cache that stores nothing and returns the keys and values for attention to use."""

    def update(
        self, keys: Tensor, values: Tensor, layer: int | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """``keys`` and ``values``: ``[samples, heads, tokens, size]``."""
        return keys, values


class ObservedCache(PassingCache):
    """Records the largest magnitudes of keys and of values; ``times`` counts the updates.

    ``real``, bool ``[samples, tokens]``, is false for padding; None if there is none. ``by_head``:
    whether each head counts by itself, and so do the heads of queries, within ``with_queries``.
    """

    def __init__(self, *, by_head: bool = False) -> None:
        self.times, self._by_head = 0, by_head
        self.real: Tensor | None = None
        self.peaks: list[Tensor] = []

    def update(
        self, keys: Tensor, values: Tensor, layer: int | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self._cover(0, keys, values)
        self.times += 1
        return keys, values

    @contextmanager
    def with_queries(self) -> Iterator[None]:
        """A context in which the queries of attention count too, after those of keys and values.

        They are seen where attention is computed by torch's ``scaled_dot_product_attention``.
        """
        attend = functional.scaled_dot_product_attention

        def observed(query: Tensor, *args: Any, **call: Any) -> Tensor:
            self._cover(2, query)
            return attend(query, *args, **call)

        functional.scaled_dot_product_attention = observed
        try:
            yield
        finally:
            functional.scaled_dot_product_attention = attend

    def _cover(self, first: int, *parts: Tensor) -> None:
        for place, part in enumerate(parts, first):
            peak = self._peak(part)
            if place < len(self.peaks):
                self.peaks[place] = torch.maximum(self.peaks[place], peak)
            else:
                self.peaks.append(peak)

    def _peak(self, part: Tensor) -> Tensor:
        sizes = part.abs()
        if self.real is not None:
            sizes = sizes * self.real[:, None, :, None].to(part.device)
        return (sizes.amax((0, 2, 3)) if self._by_head else sizes.amax()).float()

    def scales(self, args: QuantArgs, where: str) -> tuple[Tensor, ...]:
        """The scales of keys and of values that clip nothing, float32 ``[1]``, or ``[heads]``.

        By head those of queries are the third. Raises QplugError, which names ``where``, if keys or
        values were not finite.
        """
        if not self.peaks or not all(bool(torch.isfinite(peak).all()) for peak in self.peaks):
            raise QplugError(f"{where}: its keys or values are not finite on the calibration data")
        return tuple(input_scale(peak, args).flatten().cpu() for peak in self.peaks)


class RoundedCache(PassingCache):
    """Rounds keys and values under the two scales of a layer, each ``[1]``, or ``[heads]``."""

    def __init__(self, args: QuantArgs, scales: tuple[Tensor, ...]) -> None:
        if args.strategy == "attn_head":  # of keys and values [samples, heads, tokens, 1, size]
            args = replace(args, strategy="tensor")
            scales = tuple(scale.reshape(-1, 1, 1, 1) for scale in scales)
        self._args, self._scales = args, scales

    def update(
        self, keys: Tensor, values: Tensor, layer: int | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        key, value = self._scales
        return (
            fake_quantize_activations(keys, self._args, key.to(keys.device)),
            fake_quantize_activations(values, self._args, value.to(values.device)),
        )


# --- which modules fill the cache -----------------------------------------------------------------


@torch.no_grad()
def find_cache(
    source: Checkpoint, view: ModelView, args: QuantArgs, *, trust_remote_code: bool = False
) -> KVCache:
    """Find the modules that fill the cache, by running a hollow model on the meta device.

    No weight is read. Raises QplugError if a block stores nothing in its cache, or if heads are to
    have scales, and a block has others than config.json says.
    """
    from transformers import DynamicCache

    config = load_config(source.folder, trust_remote_code=trust_remote_code)
    model = build(config, source.folder, trust_remote_code=trust_remote_code).eval()
    blocks = blocks_by_name(model, view.blocks)
    watches = {name: _Watch(block) for name, block in blocks.items()}
    inside = {id(part) for block in blocks.values() for part in block.parameters()}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in inside:  # zeros that take no memory
                hollow = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
                module._parameters[name] = nn.Parameter(hollow, requires_grad=False)
    tokens = torch.zeros(1, _PROBE, dtype=torch.int64)
    cache: Any = DynamicCache()  # stays empty; it shows under which name blocks get a cache
    for name, block in blocks.items():
        block.float().to("meta")
        block.forward = watches[name]
    model.base_model(input_ids=tokens, past_key_values=cache, use_cache=False)
    for name, watch in watches.items():
        if watch.module is None:
            raise QplugError(f"{name}: nothing in it fills a KV cache, so none can be quantized")
    argument = watches[view.blocks[0]].argument
    heads = None
    if args.strategy == "attn_head":
        text = config.get_text_config()
        queries = text.num_attention_heads
        heads = (getattr(text, "num_key_value_heads", None) or queries, queries)
        for name, watch in watches.items():
            if watch.heads != heads[0]:
                raise QplugError(
                    f"{name}: stores {watch.heads} heads of keys, but config.json says {heads[0]}, "
                    "so engines cannot load scales of heads; take --kv-cache fp8"
                )
    modules = {name: watch.module or "" for name, watch in watches.items()}
    return KVCache(args, modules, argument, heads)


class _FoundError(Exception):
    """Ends a forward pass once the module that fills the cache is known."""


class _Watch:
    """Replaces the ``forward`` of a block: runs it on the meta device to find ``module``.

    Returns its input, so that everything outside of the blocks computes with real numbers.
    ``module``: the path of the module that fills the cache, None if none does. ``heads``: how many
    heads of keys it stores.
    """

    def __init__(self, block: nn.Module) -> None:
        self._block, self._forward = block, block.forward
        self.argument = ""
        self.module: str | None = None
        self.heads = 0

    def __call__(self, hidden_states: Tensor, **call: Any) -> Tensor:
        from transformers import Cache

        given = [name for name, value in call.items() if isinstance(value, Cache)]
        if given:
            self.argument = given[0]
            call = {name: _to_meta(value) for name, value in call.items()}
            with self._watching() as cache, suppress(_FoundError):
                self._forward(_to_meta(hidden_states), **{**call, self.argument: cache})
        return hidden_states

    @contextmanager
    def _watching(self) -> Iterator[PassingCache]:
        running: list[str] = []
        handles = []
        watch = self

        def enter(name: str, module: nn.Module, inputs: object) -> None:
            running.append(name)

        def leave(module: nn.Module, inputs: object, output: object) -> None:
            running.pop()

        for name, module in self._block.named_modules():
            if name:
                handles.append(module.register_forward_pre_hook(partial(enter, name)))
                handles.append(module.register_forward_hook(leave))

        class RecordingCache(PassingCache):
            def update(self, keys: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
                watch.module, watch.heads = running[-1], keys.shape[1]
                raise _FoundError  # modules behind it, such as experts, may not run on meta

        with hooked(handles):
            yield RecordingCache()


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, tuple):  # cos and sin
        return tuple(_to_meta(part) for part in value)
    return value


# --- in a whole model -----------------------------------------------------------------------------


def round_cache(
    model: nn.Module, args: QuantArgs, scales: Mapping[int, tuple[Tensor, ...]]
) -> None:
    """Make the transformers model ``model`` round keys and values from now on.

    ``scales``: of keys and of values, by number of the layer. Caches that the model is called with,
    or that ``generate`` makes, then hold rounded keys and values.
    """
    rounding = {layer: RoundedCache(args, pair) for layer, pair in scales.items()}

    def give(module: Any, inputs: tuple[Any, ...], call: dict[str, Any]) -> Any:
        from transformers import DynamicCache

        cache: Any = call.get("past_key_values")
        if cache is None:
            cache = cast("Any", DynamicCache(config=module.config))
        if not getattr(cache, "rounds", False):
            cache.update = partial(_round_then, rounding, cache.update)
            cache.rounds = True
        return inputs, {**call, "past_key_values": cache}

    # Some models with a head call the decoder inside their base model, others the base model.
    base: nn.Module = model.base_model  # type: ignore[assignment]
    for part in dict.fromkeys((model, base)):
        part.register_forward_pre_hook(give, with_kwargs=True)


def _round_then(
    rounding: Mapping[int, RoundedCache],
    update: Any,
    keys: Tensor,
    values: Tensor,
    layer: int,
    *args: Any,
) -> tuple[Tensor, Tensor]:
    rounded = rounding[layer].update(keys, values)
    stored: tuple[Tensor, Tensor] = update(*rounded, layer, *args)
    return stored
