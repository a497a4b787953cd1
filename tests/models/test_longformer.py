"""Longformer's layers: what they cost by the compiled program, decoding, mistakes.

Equality with transformers' is tested with the other families, tests/interop/huggingface/test_encoder_families.py.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec as P

from llm.errors import UserError
from llm.models.attention import AttentionConfig
from llm.models.context import Context
from llm.models.decoder import DecoderConfig
from llm.models.encoder import EncoderConfig
from llm.models.layer import LayerConfig
from llm.models.long_attention import LongAttention, LongAttentionConfig
from llm.parallel.mesh import MeshConfig, make_mesh
from llm.parallel.sharding import AxisRules, use_rules
from llm.training.losses import summed_loss
from tests.models.small_encoders import D, F, H, K, V, bert, built

LONG = LongAttentionConfig(H, H, K, window=5, causal=False, qkv_bias=True, output_bias=True, global_tokens=2)


def longformer(*mixers: AttentionConfig, **changes: Any) -> EncoderConfig:
    """RoBERTa with these mixers in turn."""
    base = bert(epsilon=1e-5, token_types=1, first_position=2, max_positions=42)
    layer = base.layers.pattern[0]
    pattern = tuple(dataclasses.replace(layer, mixer=mixer) for mixer in mixers)
    return dataclasses.replace(base, layers=dataclasses.replace(base.layers, pattern=pattern), **changes)


def products(jaxpr: Any) -> int:
    """Multiply-adds of all products of matrices that a program does, loops as often as they turn."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'dot_general':
            contracted = equation.params['dimension_numbers'][0][0]
            inner = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            total += inner * math.prod(equation.outvars[0].aval.shape)
        turns = equation.params.get('length', 1) if equation.primitive.name == 'scan' else 1
        total += turns * sum(products(inner) for inner in jaxprs_in_params(equation.params))
    return total


def cost(config: EncoderConfig, length: int) -> tuple[int, int]:
    """Bytes that forward and backward hold besides arguments and results, and multiply-adds of products."""
    graph, params = built(config)
    tokens = jnp.ones((1, length), jnp.int32)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params)
        hidden = model.hidden(tokens, global_tokens=jnp.zeros_like(tokens).at[:, 0].set(1))
        return summed_loss(model.projection(), hidden, tokens, jnp.ones(tokens.shape))[0]

    traced = jax.jit(jax.grad(loss)).trace(params, tokens)
    return traced.lower().compile().memory_analysis().temp_size_in_bytes, products(traced.jaxpr.jaxpr)


def test_memory_and_work_grow_as_the_row_does():
    mixer = LongAttentionConfig(2, 2, 8, window=33, dilations=(1, 2), causal=False, global_tokens=4)
    layer = dataclasses.replace(bert().layers.pattern[0], mixer=mixer)
    layers = dataclasses.replace(bert().layers, num_layers=1, pattern=(layer,))
    config = dataclasses.replace(bert(width=16, vocab=32, heads=2), layers=layers, position='none', token_types=0)
    (small, few), (large, many) = (cost(config, length) for length in (2048, 4096))
    assert large < 2.2 * small
    assert few < many < 2.2 * few


def test_a_causal_layer_decodes_what_the_whole_row_gives():
    mixer = LongAttentionConfig(4, 2, 8, window=3, dilations=(1, 2))
    layer = LayerConfig(mixer, bert().layers.pattern[0].feed_forward)
    config = DecoderConfig(V, D, 2, (layer,), position='rope')
    graph, params = built(config)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, V, (2, 13)))

    @jax.jit
    def run(params: Any) -> Any:
        model = nnx.merge(graph, params)
        cache = model.init_cache(2, 14)
        first, cache = model.decode(tokens[:, :6], cache, 0)
        second, cache = model.decode(tokens[:, 6:12], cache, jnp.full((2,), 6))
        third, _ = model.decode(tokens[:, 12:], cache, jnp.asarray(12))
        return model(tokens), jnp.concatenate([first, second, third], axis=1)

    whole, parts = run(params)
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-5)


def test_more_global_tokens_than_there_is_room_for_are_seen():
    graph, params = built(longformer(dataclasses.replace(LONG, global_tokens=1), first_is_global=True))
    tokens = jnp.ones((2, 8), jnp.int32)
    ids = jnp.asarray([[1] * 8, [1] * 4 + [2] * 4])
    states = nnx.merge(graph, params).encode(tokens, segment_ids=ids)
    assert np.isfinite(states[0]).all() and np.isnan(states[1]).all()


def test_stages_of_a_pipeline_need_not_wait_for_each_other():
    """On CPUs a collective-permute within one stage would, where heads of two dilations are spread over devices."""
    config = dataclasses.replace(LONG, dilations=(1, 2))
    attention = LongAttention(config, D, 'none')
    graph, params = nnx.split(attention)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32), params)
    x = jnp.asarray(rng.standard_normal((4, 16, D)), jnp.float32)
    marked = jnp.zeros((4, 16), bool).at[:, :2].set(True)

    def run(params: Any, x: jax.Array, marked: jax.Array) -> jax.Array:
        context = Context(jnp.ones(x.shape[:2], jnp.int32), global_tokens=marked)
        return nnx.merge(graph, params)(x, context)[0]

    def of_stage(*arguments: Any) -> Any:
        with use_rules(jax.sharding.get_abstract_mesh(), AxisRules()):
            return run(*arguments)

    mesh = make_mesh(MeshConfig(data=1, tensor=2, pipeline=2), jax.devices()[:4])
    rows = P('pipeline')
    mapped = jax.shard_map(
        of_stage, mesh=mesh, in_specs=(P(), rows, rows), out_specs=rows, axis_names={'pipeline'}, check_vma=False
    )
    with use_rules(mesh, AxisRules()):
        compiled = jax.jit(mapped).lower(params, x, marked).compile()
    assert ' all-gather(' in compiled.as_text()
    assert 'collective-permute' not in compiled.as_text()
    expected = jax.jit(run)(params, x, marked)
    np.testing.assert_allclose(compiled(params, x, marked), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: LongAttentionConfig(2, 2, 8), 'no window'),
        (lambda: dataclasses.replace(LONG, dilations=(1, 2, 3)), '3 dilations for 4'),
        (lambda: dataclasses.replace(LONG, dilations=(0,)), 'dilations are'),
        (lambda: dataclasses.replace(LONG, causal=True), 'global tokens see what comes after'),
        (lambda: dataclasses.replace(LONG, sinks=True), 'no sinks'),
        (lambda: LONG.build(32, 'alibi'), 'no bias on its scores'),
        (lambda: longformer(LONG, dataclasses.replace(LONG, global_tokens=0), first_is_global=True), 'without room'),
        (lambda: longformer(AttentionConfig(H, H, K, causal=False), first_is_global=True), 'without room'),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_scaled_models_keep_their_windows():
    wide = longformer(LONG, vocab_size=F).at_width(2 * D).pattern[0].mixer
    assert isinstance(wide, LongAttentionConfig) and (wide.num_heads, wide.window) == (2 * H, 5)
