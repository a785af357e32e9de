"""Rounding of queries, which engines do under a scale that is stored beside those of the cache.

Queries are seen where attention is computed by torch's ``scaled_dot_product_attention``, after
rotary embedding, so no architecture is named.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.nn import functional

from qplug.api.scheme import QuantArgs
from qplug.errors import QplugError
from qplug.numerics.activations import fake_quantize_activations

if TYPE_CHECKING:
    from torch import Tensor, nn


class RoundedQueries:
    """Rounds queries ``[samples, heads, tokens, size]`` under a stored ``scale``.

    ``args``: how the cache is stored. ``scale``: float32 ``[1]``, or one for each head of queries.
    ``groups``: the number of heads of keys. Heads that read the same keys are rounded under the
    largest of their scales, since engines keep one for them (``CompressedTensorsKVCacheMethod`` of
    vLLM). ``times`` counts the calls of attention that were rounded.
    """

    def __init__(self, args: QuantArgs, scale: Tensor, groups: int = 1) -> None:
        scale, self.times = scale.float().flatten(), 0
        if args.strategy == "attn_head":
            args = replace(args, strategy="tensor")
            largest = scale.view(groups, -1).amax(1, keepdim=True)
            scale = largest.expand(groups, len(scale) // groups).reshape(-1, 1, 1, 1)
        self._args, self._scale = args, scale

    def rounded(self, queries: Tensor) -> Tensor:
        """``queries`` as the engine multiplies them with keys, in their dtype."""
        return fake_quantize_activations(queries, self._args, self._scale.to(queries.device))

    @contextmanager
    def rounding(self) -> Iterator[None]:
        """A context in which attention multiplies keys with rounded queries."""
        attend = functional.scaled_dot_product_attention

        def with_rounded(query: Tensor, *args: Any, **call: Any) -> Tensor:
            self.times += 1
            return attend(self.rounded(query), *args, **call)

        functional.scaled_dot_product_attention = with_rounded
        try:
            yield
        finally:
            functional.scaled_dot_product_attention = attend


def round_queries(attention: nn.Module, queries: RoundedQueries, where: str) -> None:
    """Make the module ``attention``, which is called ``where``, round its queries from now on.

    A call raises QplugError if the module computes attention in another way.
    """
    forward = attention.forward

    def with_rounded(*args: Any, **call: Any) -> Any:
        before = queries.times
        with queries.rounding():
            output = forward(*args, **call)
        if queries.times == before:
            raise QplugError(
                f"{where}: does not compute attention by scaled_dot_product_attention, so qplug "
                "cannot round its queries"
            )
        return output

    attention.forward = with_rounded
