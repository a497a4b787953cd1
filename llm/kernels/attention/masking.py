"""Who attends to whom and with what score: shared by the implementations that go block by block."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Options:
    """What is known when the program is traced; see `llm.kernels.attention` for the first four.

    Attributes:
        offset: index of the first query; None if it is known at run time only.
        exempt: whether some keys are seen whatever `causal` and `window` say: Positions.global_keys.
    """

    scale: float
    causal: bool
    window: int | None
    soft_cap: float | None
    offset: int | None
    exempt: bool = False

    def keys_of(self, first: int, last: int, keys: int) -> tuple[int, int]:
        """A range of keys that holds all that the queries first..last-1 may attend to."""
        low, high = 0, keys
        if self.offset is not None and not self.exempt:
            if self.window is not None:
                low = self.offset + first - self.window + 1
            if self.causal:
                high = self.offset + last
            elif self.window is not None:
                high = self.offset + last - 1 + self.window
        low = min(max(low, 0), keys)
        return low, max(min(high, keys), low)

    def queries_of(self, first: int, last: int, queries: int) -> tuple[int, int]:
        """A range of queries that holds all that may attend to the keys first..last-1."""
        low, high = 0, queries
        if self.offset is not None and not self.exempt:
            if self.causal:
                low = first - self.offset
            elif self.window is not None:
                low = first - self.window + 1 - self.offset
            if self.window is not None:
                high = last - 1 + self.window - self.offset
        low = min(max(low, 0), queries)
        return low, max(min(high, queries), low)

    def scores(self, products: jax.Array, distance: jax.Array, slopes: jax.Array | None) -> jax.Array:
        """Scores from scaled products.

        Args:
            distance: query index minus key index. It and `slopes` broadcast against `products`.
        """
        scores = products
        if self.soft_cap is not None:
            scores = self.soft_cap * jnp.tanh(scores / self.soft_cap)
        if slopes is not None:
            scores = scores - slopes * jnp.abs(distance).astype(scores.dtype)
        return scores

    def products_gradient(self, products: jax.Array, scores_gradient: jax.Array) -> jax.Array:
        """The gradient of scaled products from that of their scores."""
        if self.soft_cap is None:
            return scores_gradient
        return scores_gradient * (1 - jnp.square(jnp.tanh(products / self.soft_cap)))

    def allowed(
        self, distance: jax.Array, *more: jax.Array | None, exempt: jax.Array | None = None
    ) -> jax.Array | None:
        """Which pairs count, by their distance, unless they are `exempt`, and by `more` conditions; None if all do."""
        conditions = []
        if self.causal:
            conditions.append(distance >= 0)
        if self.window is not None:
            conditions.append((distance if self.causal else jnp.abs(distance)) < self.window)
        if exempt is not None and conditions:
            conditions = [functools.reduce(jnp.logical_and, conditions) | exempt]
        conditions += [condition for condition in more if condition is not None]
        return functools.reduce(jnp.logical_and, conditions) if conditions else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Positions:
    """What decides, besides the arrays themselves, who attends to whom.

    Attributes:
        query_ids: [B, S]; key_ids: [B, T]; both None without segments.
        offset: [] or [B]; None if Options has it.
        key_lengths: [B], or None if all keys count.
        slopes: [H] of ALiBi, or None.
        global_keys: [B, T] bool, the keys that Options.exempt speaks of, or None; read by `chunked` alone.
    """

    query_ids: jax.Array | None = None
    key_ids: jax.Array | None = None
    offset: jax.Array | None = None
    key_lengths: jax.Array | None = None
    slopes: jax.Array | None = None
    global_keys: jax.Array | None = None

    def row_scalars(self, options: Options, batch: int, keys: int) -> jax.Array:
        """Index of each row's first query, and how many of its `keys` keys count: [B, 2] int32."""
        offset: Any = options.offset if self.offset is None else self.offset
        lengths = keys if self.key_lengths is None else jnp.minimum(self.key_lengths, keys)
        return jnp.stack([jnp.broadcast_to(jnp.asarray(x, jnp.int32), (batch,)) for x in (offset, lengths)], axis=1)

    def padded(self, queries: int, keys: int) -> 'Positions':
        """With segment ids, if there are any, of so many queries and keys: the last of a row are repeated."""
        if self.query_ids is None or self.key_ids is None:
            return self
        query_ids, key_ids = (
            jnp.pad(ids.astype(jnp.int32), [(0, 0), (0, size - ids.shape[1])], mode='edge')
            for ids, size in ((self.query_ids, queries), (self.key_ids, keys))
        )
        return dataclasses.replace(self, query_ids=query_ids, key_ids=key_ids)
