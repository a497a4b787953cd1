"""Scans and convolutions over rows that devices share give what one device gives, in order and in zig-zag."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llm.kernels.attention.sequence_axis import SequenceAxis, zigzag_order
from llm.kernels.convolution import activated_convolution, causal_convolution
from llm.kernels.selective_scan import selective_scan
from llm.kernels.ssd import ssd
from llm.parallel.mesh import MeshConfig, make_mesh
from tests.models.small_decoders import compiled

DEVICES = 4
RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.standard_normal(shape)


def problem(kind, length):
    """(function with one result, arrays whose second axis is the row, other arrays)."""
    if kind in ('convolution', 'activated_convolution'):
        # What TPUs run, and what CPUs do.
        activated = functools.partial(activated_convolution, device=jax.devices()[0])
        function = causal_convolution if kind == 'convolution' else activated
        return function, {'x': draw(2, length, 3)}, {'weight': draw(4, 3), 'bias': draw(3)}
    if kind == 'selective_scan':
        tokens = {'x': draw(2, length, 3), 'dt': RNG.uniform(0, 1, (2, length, 3)), 'b': draw(2, length, 4)}
        others = {'a': -RNG.uniform(0.1, 2, (3, 4))}
        return lambda **a: selective_scan(**a)[0], tokens | {'c': draw(2, length, 4)}, others
    tokens = {'x': draw(2, length, 4, 3), 'dt': RNG.uniform(0, 1, (2, length, 4)), 'b': draw(2, length, 2, 5)}
    return lambda **a: ssd(**a)[0], tokens | {'c': draw(2, length, 2, 5)}, {'a': -RNG.uniform(0.1, 2, 4)}


@pytest.mark.parametrize('kind', ['convolution', 'activated_convolution', 'selective_scan', 'ssd'])
@pytest.mark.parametrize(('zigzag', 'length'), [(False, 24), (True, 24), (True, 8)])
def test_pieces_give_what_whole_rows_give(kind, zigzag, length):
    """Of length 8 the pieces are single tokens, shorter than what a convolution reads. Segments end within pieces."""
    with jax.enable_x64():
        function, tokens, others = problem(kind, length)
        ids = np.sort(RNG.integers(0, 3, (2, length)))
        order = zigzag_order(length, DEVICES) if zigzag else np.arange(length)
        weights = draw(*tokens['x'].shape)
        mesh = make_mesh(MeshConfig(data=1, sequence=DEVICES))
        axis = SequenceAxis('sequence', DEVICES, 'ring' if zigzag else 'all_gather', zigzag)

        def whole(tokens, others):
            return function(**tokens, **others, segment_ids=jnp.asarray(ids))

        def pieces(tokens, others):
            run = jax.shard_map(
                lambda tokens, others, ids: function(**tokens, **others, segment_ids=ids, sequence_axis=axis),
                mesh=mesh,
                in_specs=(P(None, 'sequence'), P(), P(None, 'sequence')),
                out_specs=P(None, 'sequence'),
                check_vma=False,
            )
            moved = jax.tree.map(lambda x: x[:, order], tokens)
            return run(moved, others, jnp.asarray(ids[:, order]))[:, np.argsort(order)]

        @functools.partial(compiled, static_argnums=0)
        def both(run, tokens, others):
            y, pullback = jax.vjp(run, tokens, others)
            return y, pullback(jnp.asarray(weights))

        expected, actual = both(whole, tokens, others), both(pieces, tokens, others)
        for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
            np.testing.assert_allclose(other, one, rtol=0, atol=1e-12 * max(1, np.abs(one).max()))
