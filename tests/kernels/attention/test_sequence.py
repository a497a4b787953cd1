"""Attention over rows that devices share, against the whole row on one device: float64, value and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from llm.kernels.attention import dot_product_attention, reference
from llm.kernels.attention.sequence_axis import SequenceAxis, zigzag_order
from tests.kernels.attention.problems import OPTIONS, value_and_gradients

BATCH, LENGTH, HEADS, SIZE = 2, 32, 4, 8
CASES = {
    'causal': {},
    'packed, grouped, sinks': {'segments': True, 'kv_heads': 2, 'sinks': True},
    'window, soft cap, one key head': {'window': 11, 'soft_cap': 1.5, 'kv_heads': 1},
    'packed, all directions, alibi': {'segments': True, 'causal': False, 'alibi': True},
}
LAYOUTS = {
    'ring': ('ring', True),
    'ring in order': ('ring', False),
    'all_gather': ('all_gather', True),
    'all_gather in order': ('all_gather', False),
    'ulysses': ('ulysses', False),
}


def problem(kv_heads=HEADS, segments=False, sinks=False, alibi=False, **options):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((BATCH, LENGTH, heads, SIZE)) for heads in (HEADS, kv_heads, kv_heads, HEADS)]
    if segments:
        ids = np.sort(rng.integers(1, 4, (BATCH, LENGTH)))
        options |= {'query_segment_ids': ids, 'key_segment_ids': ids}
    if sinks:
        options['sinks'] = rng.standard_normal(HEADS)
    if alibi:
        options['alibi_slopes'] = rng.uniform(0.05, 1, HEADS)
    return arrays, OPTIONS | options | {'scale': SIZE**-0.5}


def shared(devices, layout, implementation):
    """The function of whole rows, each cut into pieces on `devices`."""
    method, zigzag = LAYOUTS[layout]
    axis = SequenceAxis('sequence', devices, method, zigzag)
    mesh = Mesh(np.array(jax.devices()[:devices]), ('sequence',))
    order = zigzag_order(LENGTH, devices) if zigzag else np.arange(LENGTH)
    by_token, whole = PartitionSpec(None, 'sequence'), PartitionSpec()

    def attend(query, key, value, *, query_segment_ids, key_segment_ids, sinks, alibi_slopes, **options):
        arrays = {'query': query, 'key': key, 'value': value}
        if query_segment_ids is not None:
            arrays |= {'query_segment_ids': query_segment_ids, 'key_segment_ids': key_segment_ids}
        arrays = {name: x[:, order] for name, x in arrays.items()}
        specs = dict.fromkeys(arrays, by_token)
        for name, x in (('sinks', sinks), ('alibi_slopes', alibi_slopes)):
            if x is not None:
                arrays[name], specs[name] = x, whole
        function = functools.partial(
            dot_product_attention, implementation=implementation, sequence_axis=axis, **options
        )
        output = jax.shard_map(
            lambda parts: function(**parts), mesh=mesh, in_specs=(specs,), out_specs=by_token, check_vma=False
        )(arrays)
        return output[:, np.argsort(order)]

    return attend


def agree(devices, layout, case, implementation):
    arrays, options = problem(**CASES[case])
    with jax.enable_x64():
        expected = value_and_gradients(reference.dot_product_attention, arrays, options, jnp.float64)
        actual = value_and_gradients(shared(devices, layout, implementation), arrays, options, jnp.float64)
    for exact, ours in zip(expected, actual, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-9 * np.abs(exact).max())


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_four_devices_equal_one(layout, case):
    agree(4, layout, case, 'chunked')


@pytest.mark.parametrize(
    ('layout', 'implementation'), [*((layout, 'pallas_tpu') for layout in LAYOUTS), ('ring', 'pallas_gpu')]
)
def test_two_devices_equal_one_with_the_kernels(layout, implementation):
    agree(2, layout, 'packed, grouped, sinks', implementation)


def test_a_ring_of_eight_devices():
    agree(8, 'ring', 'packed, grouped, sinks', 'chunked')


def test_zigzag_gives_every_device_the_first_and_last_chunks_that_are_left():
    np.testing.assert_array_equal(zigzag_order(12, 3), [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7])


def test_heads_that_ulysses_cannot_share_are_named():
    with pytest.raises(ValueError, match='4 heads cannot be divided over 8 devices'):
        agree(8, 'ulysses', 'causal', 'chunked')


def test_only_the_methods_that_exist():
    with pytest.raises(ValueError, match="no sequence method is called 'star'"):
        SequenceAxis('sequence', 2, 'star', False)
    with pytest.raises(ValueError, match='in order'):
        SequenceAxis('sequence', 2, 'ulysses', True)
    with pytest.raises(ValueError, match='query_offset'):
        dot_product_attention(
            *[jnp.zeros((1, 4, 2, 8))] * 3,
            scale=1.0,
            query_offset=1,
            sequence_axis=SequenceAxis('sequence', 2, 'ring', False),
        )
