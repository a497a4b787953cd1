"""Attention problems drawn at random, and how an implementation's value and gradients are taken."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from llm.kernels.attention import flash
from llm.kernels.attention.masking import Options, Positions
from tests.models.small_decoders import compiled

OPTIONS = {
    'causal': True,
    'window': None,
    'soft_cap': None,
    'query_segment_ids': None,
    'key_segment_ids': None,
    'query_offset': 0,
    'key_lengths': None,
    'alibi_slopes': None,
    'sinks': None,
    'distance_bias': None,
}


@st.composite
def problems(draw):
    """Arrays and options; small, so that with small blocks every path through them is met."""
    batch, group, kv_heads, head_size = (draw(st.integers(1, n)) for n in (2, 3, 2, 5))
    queries, keys = draw(st.integers(1, 13)), draw(st.integers(1, 13))
    options = {
        'causal': draw(st.booleans()),
        'window': draw(st.none() | st.integers(1, 8)),
        'soft_cap': draw(st.none() | st.floats(0.5, 5)),
    }
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()):
        options['query_segment_ids'] = np.sort(rng.integers(0, 3, (batch, queries)))
        options['key_segment_ids'] = np.sort(rng.integers(0, 3, (batch, keys)))
    if draw(st.booleans()):
        options['alibi_slopes'] = rng.uniform(0.05, 1, group * kv_heads)
    if draw(st.booleans()):
        options['key_lengths'] = rng.integers(0, keys + 3, batch)
    if draw(st.booleans()):
        options['sinks'] = rng.standard_normal(group * kv_heads)
    kind = draw(st.sampled_from(['static', 'scalar', 'row']))
    offset = draw(st.integers(-2, 8))
    options['query_offset'] = {'static': offset, 'scalar': np.int32(offset), 'row': offset + np.arange(batch)}[kind]
    shapes = [(batch, size, heads, head_size) for size, heads in ((queries, group * kv_heads), (keys, kv_heads))]
    arrays = [rng.standard_normal(shape) for shape in (shapes[0], shapes[1], shapes[1], shapes[0])]
    return arrays, OPTIONS | options | {'scale': head_size**-0.5}


def value_and_gradients(implementation, arrays, options, dtype):
    """Output and gradients of its sum weighted by the last array, in the other three, distance_bias and sinks."""
    query, key, value, weight = (jnp.asarray(x, dtype) for x in arrays)
    static = {name: x for name, x in options.items() if not isinstance(x, np.ndarray | np.integer)}
    traced = {name: jnp.asarray(x) for name, x in options.items() if name not in static}

    more = {name: traced.pop(name) for name in ('sinks', 'distance_bias') if name in traced}

    @compiled
    def run(query, key, value, more, traced):
        def function(query, key, value, more):
            return implementation(query, key, value, **static | traced | more)

        output, pullback = jax.vjp(function, query, key, value, more)
        return output, *jax.tree.leaves(pullback(weight))

    return [np.asarray(x) for x in run(query, key, value, more, traced)]


def by_blocks(forward, backward):
    """An implementation by blocks as a function with the arguments of the reference."""
    implementation = flash.Implementation(forward, backward)

    def attend(
        query,
        key,
        value,
        *,
        scale,
        causal,
        window,
        soft_cap,
        query_segment_ids,
        key_segment_ids,
        query_offset,
        key_lengths,
        alibi_slopes,
        sinks,
        distance_bias=None,
        global_keys=None,
    ):
        static = isinstance(query_offset, int)
        options = Options(scale, causal, window, soft_cap, query_offset if static else None, global_keys is not None)
        offset = None if static else query_offset
        positions = Positions(query_segment_ids, key_segment_ids, offset, key_lengths, alibi_slopes, global_keys)
        return flash.attention(
            implementation, options, flash.Inputs(query, key, value, positions, sinks, distance_bias)
        )

    return attend
