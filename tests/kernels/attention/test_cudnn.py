import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.errors import UserError
from llm.kernels.attention import cudnn, dot_product_attention, reference
from llm.kernels.attention.flash import Inputs
from llm.kernels.attention.masking import Options, Positions
from llm.kernels.attention.sequence_axis import SequenceAxis
from tests.kernels.attention.problems import OPTIONS

PLAIN = Options(0.3, True, None, None, 0)


@pytest.mark.parametrize(
    ('options', 'lengths'),
    [({}, None), ({'causal': False}, None), ({'window': 3}, None), ({}, [4, 9]), ({'causal': False}, [1, 20])],
)
def test_what_it_is_told_means_the_same_to_jax(options, lengths):
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.standard_normal((2, n, heads, 8)), jnp.float32) for n, heads in ((7, 4), (9, 2), (9, 2))
    )
    lengths = None if lengths is None else jnp.asarray(lengths)
    told = cudnn.jax_arguments(dataclasses.replace(PLAIN, **options), Positions(key_lengths=lengths), 9)
    # Its XLA implementation: cuDNN itself needs a GPU.
    actual = jax.nn.dot_product_attention(query, key, value, **told, implementation='xla')
    options = OPTIONS | {'scale': PLAIN.scale, 'key_lengths': lengths} | options
    expected = reference.dot_product_attention(query, key, value, **options)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


def arrays(size=64, dtype=jnp.bfloat16):
    return [jnp.zeros((2, 4, 2, size), dtype) for _ in range(3)]


@pytest.mark.parametrize(
    ('options', 'positions', 'sinks', 'given', 'named'),
    [
        ({}, {}, None, arrays(dtype=jnp.float32), 'float32'),
        ({}, {}, None, arrays(size=60), 'head size 60'),
        ({}, {}, None, arrays(size=256), 'head size 256'),
        ({'soft_cap': 30.0}, {}, None, arrays(), 'soft cap'),
        ({}, {'slopes': jnp.ones(2)}, None, arrays(), 'ALiBi'),
        ({}, {}, jnp.ones(2), arrays(), 'sinks'),
        ({}, {'query_ids': jnp.ones((2, 4), int), 'key_ids': jnp.ones((2, 4), int)}, None, arrays(), 'segment ids'),
        ({'offset': 3}, {}, None, arrays(), 'query offset'),
        ({'offset': None}, {'offset': jnp.zeros(2, int)}, None, arrays(), 'query offset'),
        ({'window': 3, 'causal': False}, {}, None, arrays(), 'window without'),
        ({'window': 3}, {'key_lengths': jnp.ones(2, int)}, None, arrays(), 'window together'),
    ],
)
def test_what_it_cannot_do_is_refused(options, positions, sinks, given, named):
    with pytest.raises(UserError, match=f'cannot do .*{named}'):
        cudnn.attention(dataclasses.replace(PLAIN, **options), Inputs(*given, Positions(**positions), sinks), gpu='8.0')


def test_wide_heads_are_left_to_hopper():
    with pytest.raises(UserError, match='head size 264'):
        cudnn.attention(PLAIN, Inputs(*arrays(size=264), Positions(), None), gpu='9.0')


@pytest.mark.parametrize('gpu', [None, '7.5'])
def test_other_devices_are_refused(gpu):
    with pytest.raises(UserError, match='needs an NVIDIA GPU'):
        cudnn.attention(PLAIN, Inputs(*arrays(), Positions(), None), gpu=gpu)


def test_asking_for_it_here_is_refused():
    with pytest.raises(UserError, match='needs an NVIDIA GPU'):
        dot_product_attention(*arrays(), scale=0.3, implementation='cudnn')
    ring = SequenceAxis('sequence', 2, 'ring', zigzag=False)
    with pytest.raises(UserError, match='cut along a mesh axis'):
        dot_product_attention(*arrays(), scale=0.3, implementation='cudnn', sequence_axis=ring)
