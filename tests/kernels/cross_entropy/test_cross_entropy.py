import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from llm.kernels.cross_entropy import Placement, reference, summed_cross_entropy, token_cross_entropy
from llm.kernels.cross_entropy.chunked import default_chunk
from tests.models.small_decoders import compiled


def draw(seed, batch, length, width, vocabulary):
    """hidden, kernel, targets (some outside the vocabulary, where the weight is 0), weights; logits of size 2 or so."""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.2, 2, (batch, length)) * (rng.random((batch, length)) < 0.8)
    inside, outside = rng.integers(0, vocabulary, (batch, length)), rng.choice([-100, -1, vocabulary, 2**31 - 1])
    return (
        rng.standard_normal((batch, length, width)),
        2 * rng.standard_normal((width, vocabulary)) / np.sqrt(width),
        np.where(weights > 0, inside, outside).astype(np.int32),
        weights,
    )


@st.composite
def problems(draw_from):
    sizes = [draw_from(st.integers(1, most)) for most in (3, 9, 6, 17)]
    options = {
        'multiplier': draw_from(st.sampled_from([1.0, 0.3, 2.5])),
        'soft_cap': draw_from(st.none() | st.floats(0.5, 30)),
    }
    z_loss = draw_from(st.sampled_from([0.0, 0.2]))
    chunk = draw_from(st.none() | st.integers(1, 8))
    return draw(draw_from(st.integers(0, 2**32 - 1)), *sizes), options, z_loss, chunk


def summed_and_gradients(function, arrays, dtype):
    """[loss, its two parts, gradients of hidden and kernel] of a summed loss, compiled; the loss is scaled by 0.5."""
    hidden, kernel, targets, weights = arrays

    @compiled
    def run(hidden, kernel, weights):
        def scaled(hidden, kernel):
            loss, parts = function(hidden, kernel, targets, weights)
            return 0.5 * loss, parts

        (loss, parts), gradients = jax.value_and_grad(scaled, (0, 1), has_aux=True)(hidden, kernel)
        return [loss, parts['nll'], parts['z_loss'], *gradients]

    return [np.asarray(x) for x in run(*(jnp.asarray(x, dtype) for x in (hidden, kernel, weights)))]


def token_and_gradients(function, arrays, dtype):
    """[nll, log_z, gradients of hidden and kernel of a sum in which every token's two losses weigh differently]."""
    hidden, kernel, targets, weights = arrays
    targets = np.where(weights > 0, targets, 0)

    @compiled
    def run(hidden, kernel, weights):
        losses, pullback = jax.vjp(lambda hidden, kernel: function(hidden, kernel, targets), hidden, kernel)
        return [*losses, *pullback((weights.astype(losses[0].dtype), jnp.cos(losses[1])))]

    return [np.asarray(x) for x in run(*(jnp.asarray(x, dtype) for x in (hidden, kernel, weights)))]


def close(actual, expected, tolerance):
    """Within `tolerance` of the largest value of each array."""
    for ours, exact in zip(actual, expected, strict=True):
        assert ours.shape == exact.shape
        size = max(1.0, float(np.abs(exact).max()))
        np.testing.assert_allclose(ours.astype(np.float64), exact, rtol=0, atol=tolerance * size)


@settings(max_examples=25, derandomize=True)
@given(problem=problems())
def test_the_sum_and_its_gradients_equal_the_reference(problem):
    arrays, options, z_loss, chunk = problem
    ours = functools.partial(summed_cross_entropy, **options, z_loss=z_loss, chunk=chunk)
    definition = functools.partial(reference.summed_cross_entropy, **options, z_loss=z_loss)
    with jax.enable_x64():
        expected = summed_and_gradients(definition, arrays, jnp.float64)
        close(summed_and_gradients(ours, arrays, jnp.float64), expected, 1e-12)
    close(summed_and_gradients(ours, arrays, jnp.float32), expected, 1e-5)


@settings(max_examples=15, derandomize=True)
@given(problem=problems())
def test_token_losses_and_their_gradients_equal_the_reference(problem):
    arrays, options, _, chunk = problem
    ours = functools.partial(token_cross_entropy, **options, chunk=chunk)
    with jax.enable_x64():
        definition = functools.partial(reference.token_cross_entropy, **options)
        expected = token_and_gradients(definition, arrays, jnp.float64)
        close(token_and_gradients(ours, arrays, jnp.float64), expected, 1e-12)
    close(token_and_gradients(ours, arrays, jnp.float32), expected, 1e-5)


@pytest.mark.parametrize('chunk', [None, 16])
@pytest.mark.parametrize(('dtype', 'rounding'), [(jnp.bfloat16, 2**-8), (jnp.float16, 2**-11)])
def test_half_precision_is_as_good_as_its_rounding(dtype, rounding, chunk):
    hidden, kernel, targets, weights = draw(0, 2, 70, 16, 300)
    # What the products see, exactly: the reference then differs by rounding alone.
    rounded = [np.asarray(jnp.asarray(x, dtype), np.float32) for x in (hidden, kernel)]
    expected = summed_and_gradients(
        functools.partial(reference.summed_cross_entropy, multiplier=1.0, soft_cap=5.0, z_loss=1e-3),
        (*rounded, targets, weights),
        jnp.float32,
    )

    def ours(hidden, kernel, targets, weights):
        options = {'soft_cap': 5.0, 'z_loss': 1e-3, 'chunk': chunk}
        return summed_cross_entropy(hidden.astype(dtype), kernel, targets, weights, **options)

    actual = summed_and_gradients(ours, (*rounded, targets, weights), jnp.float32)
    close(actual[:3], expected[:3], 1e-6)
    close(actual[3:], expected[3:], 2 * rounding)


def test_small_probabilities_are_not_lost_in_float16():
    """Uniform over 2^17 pieces, 7.6e-6 each, which float16 rounds to a multiple of 6e-8; less vanishes."""
    vocabulary, small = 2**17, 2.0**-10
    hidden, kernel = jnp.ones((1, 1, 1), jnp.float16), jnp.zeros((1, vocabulary))
    weights = jnp.full((1, 1), small)
    gradient = jax.grad(lambda k: summed_cross_entropy(hidden, k, jnp.zeros((1, 1), int), weights)[0])(kernel)
    np.testing.assert_allclose(gradient[0, 1:], small / vocabulary, rtol=1e-5)


@pytest.mark.oracle
@pytest.mark.parametrize('chunk', [None, 5])
def test_equals_torch(chunk):
    import torch

    hidden, kernel, targets, weights = draw(1, 3, 7, 6, 19)
    targets = np.where(weights > 0, targets, -100)
    weights = (weights > 0).astype(np.float64)
    h, k = (torch.tensor(x, requires_grad=True) for x in (hidden, kernel))
    logits = 4.0 * torch.tanh(0.7 * (h @ k) / 4.0)
    flat, ids = logits.view(-1, 19), torch.tensor(targets, dtype=torch.int64).view(-1)
    each = torch.nn.functional.cross_entropy(flat, ids, reduction='none', ignore_index=-100)
    z_loss = 0.01 * (torch.logsumexp(flat, -1) ** 2 * torch.tensor(weights).view(-1)).sum()
    (0.5 * (each.sum() + z_loss)).backward()
    ours = functools.partial(summed_cross_entropy, multiplier=0.7, soft_cap=4.0, z_loss=0.01, chunk=chunk)
    with jax.enable_x64():
        actual = summed_and_gradients(ours, (hidden, kernel, targets, weights), jnp.float64)
        options = {'multiplier': 0.7, 'soft_cap': 4.0, 'chunk': chunk}
        nll, _ = token_cross_entropy(hidden, kernel, targets, **options)
    expected = [0.5 * (each.sum() + z_loss), each.sum(), z_loss, h.grad, k.grad]
    close(actual, [x.detach().numpy() for x in expected], 1e-12)
    real = weights > 0
    np.testing.assert_allclose(np.asarray(nll)[real], each.detach().view(3, 7).numpy()[real], rtol=1e-12)


def test_padding_adds_nothing_whatever_stands_there():
    hidden, kernel, targets, weights = (jnp.asarray(x) for x in draw(2, 2, 9, 4, 11))
    padding = weights == 0
    assert jnp.any(padding)

    def run(hidden, targets):
        function = functools.partial(summed_cross_entropy, z_loss=0.1, chunk=4)
        return jax.value_and_grad(lambda k: function(hidden, k, targets, weights), has_aux=True)(kernel)

    before = run(hidden, targets)
    after = run(jnp.where(padding[..., None], 1e3, hidden), jnp.where(padding, 3, targets))
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize('target', [-1, -100, 11, 2**31 - 1])
def test_a_target_outside_the_vocabulary_is_not_a_number(target):
    hidden, kernel, targets, _ = (jnp.asarray(x) for x in draw(3, 1, 4, 4, 11))
    targets = jnp.clip(targets, 0, 10).at[0, 2].set(target)
    nll, log_z = token_cross_entropy(hidden, kernel, targets, chunk=2)
    assert np.isnan(nll[0]).tolist() == [False, False, True, False]
    assert np.all(np.isfinite(log_z))
    assert np.isnan(summed_cross_entropy(hidden, kernel, targets, jnp.ones((1, 4)))[0])


@pytest.mark.parametrize('dtype', [jnp.uint8, jnp.int16, jnp.uint32])
def test_targets_of_any_integer_type(dtype):
    hidden, kernel, _, _ = (jnp.asarray(x) for x in draw(4, 1, 3, 4, 300))
    targets = jnp.asarray([[0, 7, 255]])
    expected = token_cross_entropy(hidden, kernel, targets)
    jax.tree.map(np.testing.assert_array_equal, token_cross_entropy(hidden, kernel, targets.astype(dtype)), expected)


def test_large_logits_stay_finite():
    kernel = jnp.asarray([[1e4, -1e4, 0.0]])
    nll, log_z = token_cross_entropy(jnp.ones((1, 1, 1)), kernel, jnp.asarray([[1]]))
    assert float(nll[0, 0]) == 2e4 and float(log_z[0, 0]) == 1e4


def test_only_the_loss_has_a_gradient():
    hidden, kernel, targets, weights = (jnp.asarray(x) for x in draw(5, 1, 5, 4, 11))
    zeros = jax.grad(lambda h: summed_cross_entropy(h, kernel, targets, weights, z_loss=0.1)[1]['nll'])(hidden)
    assert not np.any(zeros)
    assert not np.any(jax.grad(lambda w: summed_cross_entropy(hidden, kernel, targets, w)[0])(weights))


# Axis sizes, and what they split. Some embed axes split tokens too (their gradient is scattered), some do not (sliced).
PLACEMENTS = {
    'data': ({'d': 8}, {'batch': ('d',)}),
    'fsdp': ({'f': 4}, {'batch': ('f',), 'embed': ('f',)}),
    'vocabulary over two axes': ({'p': 2, 't': 4}, {'vocab': ('p', 't')}),
    'the other way round': ({'p': 2, 't': 4}, {'vocab': ('t', 'p')}),
    'all': ({'d': 2, 'f': 2, 't': 2}, {'batch': ('d', 'f'), 'embed': ('f',), 'vocab': ('t',)}),
    'sequence': ({'f': 2, 's': 2, 't': 2}, {'batch': ('f',), 'sequence': ('s',), 'embed': ('f', 's'), 'vocab': ('t',)}),
    'embed without tokens': ({'e': 2, 'f': 2, 't': 2}, {'batch': ('f',), 'embed': ('e', 'f'), 'vocab': ('t',)}),
    'tokens without embed': ({'s': 2, 'f': 4}, {'sequence': ('s',), 'embed': ('f', 's')}),
}


@pytest.mark.parametrize('chunk', [None, 2])
@pytest.mark.parametrize('name', PLACEMENTS)
def test_a_mesh_gives_what_one_device_gives(name, chunk):
    sizes, axes = PLACEMENTS[name]
    devices = jax.devices()[: np.prod(list(sizes.values()))]
    kinds = (jax.sharding.AxisType.Auto,) * len(sizes)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices)
    arrays = draw(6, 8, 4, 8, 24)
    options = {'multiplier': 0.7, 'soft_cap': 4.0, 'chunk': chunk, 'placement': Placement(mesh, **axes)}
    one = {'multiplier': 0.7, 'soft_cap': 4.0}
    with jax.enable_x64():
        close(
            summed_and_gradients(functools.partial(summed_cross_entropy, z_loss=0.1, **options), arrays, jnp.float64),
            summed_and_gradients(
                functools.partial(reference.summed_cross_entropy, z_loss=0.1, **one), arrays, jnp.float64
            ),
            1e-12,
        )
        close(
            token_and_gradients(functools.partial(token_cross_entropy, **options), arrays, jnp.float64),
            token_and_gradients(functools.partial(reference.token_cross_entropy, **one), arrays, jnp.float64),
            1e-12,
        )


@pytest.mark.parametrize('name', ['one device', 'all', 'sequence'])
def test_a_bias_of_the_vocabulary(name):
    placement = Placement()
    if name in PLACEMENTS:
        sizes, axes = PLACEMENTS[name]
        kinds = (jax.sharding.AxisType.Auto,) * len(sizes)
        placement = Placement(jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds), **axes)
    with jax.enable_x64():
        hidden, kernel, targets, weights = map(jnp.asarray, draw(9, 8, 4, 8, 24))
        bias = jnp.asarray(np.random.default_rng(1).standard_normal(24))
        options = {'multiplier': 0.7, 'soft_cap': 4.0}

        def summed(function, **more):
            def loss(*three):
                hidden, kernel, bias = three
                return function(hidden, kernel, targets, weights, z_loss=0.1, bias=bias, **options, **more)[0]

            value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(hidden, kernel, bias)
            return [np.asarray(x) for x in (value, *gradients)]

        def token(function, **more):
            inside = jnp.where(weights > 0, targets, 0)

            def loss(*three):
                hidden, kernel, bias = three
                nll, log_z = function(hidden, kernel, inside, bias=bias, **options, **more)
                return jnp.sum(nll * weights + jnp.cos(log_z))

            value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(hidden, kernel, bias)
            return [np.asarray(x) for x in (value, *gradients)]

        ours = summed(summed_cross_entropy, placement=placement, chunk=3)
        close(ours, summed(reference.summed_cross_entropy), 1e-12)
        close(token(token_cross_entropy, placement=placement, chunk=3), token(reference.token_cross_entropy), 1e-12)


# Mesh, manual axes, and what they and the others split.
MANUAL = {
    'vocabulary': ({'p': 4}, ('p',), {'vocab': ('p',)}),
    'vocabulary over an open axis too': ({'p': 2, 't': 2}, ('p',), {'vocab': ('p', 't')}),
    'open tokens and embed': (
        {'p': 2, 's': 2, 't': 2},
        ('p',),
        {'vocab': ('p', 't'), 'sequence': ('s',), 'embed': ('s',)},
    ),
}


@pytest.mark.parametrize('name', MANUAL)
def test_manual_code_gives_what_one_device_gives(name):
    """The loss is used on one device of the manual axis; gradients of `hidden` are terms of a sum over all."""
    sizes, manual, axes = MANUAL[name]
    devices = jax.devices()[: np.prod(list(sizes.values()))]
    kinds = (jax.sharding.AxisType.Auto,) * len(sizes)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices)
    arrays = draw(7, 8, 4, 8, 24)

    def in_manual_code(function):
        def body(hidden, kernel, targets, *rest):
            placement = Placement(jax.sharding.get_abstract_mesh(), **axes)
            losses, vjp = jax.vjp(lambda h, k: function(h, k, targets, *rest, placement=placement), hidden, kernel)
            here = jax.lax.axis_index('p') == 1
            d_hidden, d_kernel = vjp(jax.tree.map(lambda x: jnp.where(here, jnp.cos(x), 0), losses))
            return jax.tree.leaves(losses), jax.lax.psum(d_hidden, manual), d_kernel

        kernel = PartitionSpec(None, manual)
        mapped = jax.shard_map(
            body,
            mesh=mesh,
            in_specs=(PartitionSpec(), kernel, *(PartitionSpec(),) * (len(arguments) - 2)),
            out_specs=(PartitionSpec(), PartitionSpec(), kernel),
            axis_names=set(manual),
            check_vma=False,
        )
        losses, *gradients = jax.jit(mapped)(*arguments)
        return *losses, *gradients

    def plain(function):
        losses, vjp = jax.vjp(lambda h, k: function(h, k, *arguments[2:]), *arguments[:2])
        return *jax.tree.leaves(losses), *vjp(jax.tree.map(jnp.cos, losses))

    with jax.enable_x64():
        hidden, kernel, targets, weights = (jnp.asarray(x) for x in arrays)
        hidden, kernel = hidden.astype(jnp.float64), kernel.astype(jnp.float64)
        arguments = hidden, kernel, targets, weights
        options = {'multiplier': 0.7, 'soft_cap': 4.0}

        def total(function):
            return lambda *given, **more: function(*given, **options, z_loss=0.1, **more)[0]

        close(in_manual_code(total(summed_cross_entropy)), plain(total(reference.summed_cross_entropy)), 1e-12)
        arguments = hidden, kernel, targets
        ours, definition = (
            functools.partial(function, **options) for function in (token_cross_entropy, reference.token_cross_entropy)
        )
        close(in_manual_code(ours), plain(definition), 1e-12)


def test_an_axis_that_splits_vocabulary_and_tokens_is_refused():
    with pytest.raises(ValueError, match='an axis of the vocabulary also splits tokens'):
        Placement(None, batch=('d', 't'), vocab=('t',))


def gradient_program(tokens, vocabulary, placement=Placement()):
    """The compiled gradient of a sum over 4 rows and a width of 8, placed as it says."""

    def array(shape, dtype, *spec):
        sharding = None if placement.mesh is None else NamedSharding(placement.mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    rows = 4, tokens // 4
    arrays = (
        array((*rows, 8), jnp.float32, placement.batch),
        array((8, vocabulary), jnp.float32, placement.embed, placement.vocab),
        array(rows, jnp.int32, placement.batch),
        array(rows, jnp.float32, placement.batch),
    )
    gradient = jax.grad(lambda *x: summed_cross_entropy(*x, placement=placement)[0], (0, 1))
    return jax.jit(gradient).lower(*arrays).compile()


def test_the_program_holds_the_logits_of_one_chunk():
    vocabulary, tokens = 2**14, 2**12
    program = gradient_program(tokens, vocabulary)
    shapes = re.findall(r'\b[a-z]+\d+\[([\d,]+)\]', program.as_text())
    largest = max(math.prod(map(int, shape.split(','))) for shape in shapes)
    assert default_chunk(vocabulary, 'cpu') == 128
    assert largest == 128 * vocabulary
    assert program.memory_analysis().temp_size_in_bytes < 4 * tokens * vocabulary / 8


def test_the_collectives_of_a_mesh_and_no_others():
    mesh = jax.make_mesh((2, 2, 2), ('d', 'f', 't'), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    program = gradient_program(2**12, 2**14, Placement(mesh, batch=('d', 'f'), embed=('f',), vocab=('t',)))
    found = re.findall(
        r'= \(?\w+\[([\d,]*)\]\S* (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(', program.as_text()
    )
    assert sorted(found) == sorted(
        [
            ('256', 'all-reduce'),  # in the loop over chunks of 256 tokens: the largest logit,
            ('2,256', 'all-reduce'),  # the sum of exponentials and the target's logit
            ('8,8192', 'all-gather'),  # the kernel's width, but half of its vocabulary
            ('1,1024,8', 'all-reduce'),  # d_hidden of a device's tokens, over t
            ('4,8192', 'reduce-scatter'),  # d_kernel over f
            ('4,8192', 'all-reduce'),  # and what is left of it over d
        ]
    )


def test_three_products_with_gradients_and_one_without():
    hidden, kernel, targets, weights = draw(7, 2, 8, 4, 11)

    def products(function):
        return str(jax.make_jaxpr(function)(hidden, kernel)).count('dot_general')

    def loss(hidden, kernel):
        return summed_cross_entropy(hidden, kernel, targets, weights, chunk=4)[0]

    assert (products(loss), products(jax.grad(loss, (0, 1)))) == (1, 3)
