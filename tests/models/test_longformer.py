"""Longformer against transformers' and against a full mask; what it costs by the compiled program."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from tests.models.test_encoder_oracles import SIZES, bert_parameters, close, loss_and_gradients

from llm.errors import UserError
from llm.models.attention import AttentionConfig
from llm.models.decoder import DecoderConfig
from llm.models.encoder import EncoderConfig
from llm.models.layer import LayerConfig
from llm.models.long_attention import LongAttentionConfig
from llm.training.losses import summed_loss
from tests.models.small_encoders import D, F, H, K, V, bert, built, linear, nested

LONG = LongAttentionConfig(H, H, K, window=5, causal=False, qkv_bias=True, output_bias=True, global_tokens=2)


def longformer(*mixers: AttentionConfig, **changes: Any) -> EncoderConfig:
    """RoBERTa with these mixers in turn."""
    base = bert(epsilon=1e-5, token_types=1, first_position=2, max_positions=42)
    layer = base.layers.pattern[0]
    pattern = tuple(dataclasses.replace(layer, mixer=mixer) for mixer in mixers)
    return dataclasses.replace(base, layers=dataclasses.replace(base.layers, pattern=pattern), **changes)


def parameters(state: Any) -> Any:
    """transformers' Longformer of two layers as ours of a pattern of two."""
    found = bert_parameters(state, 2, H, 'longformer', 'lm_head')
    stacked = found['encoder']['layers']['0']
    layers = {}
    for i in range(2):
        layer, own = jax.tree.map(lambda x, i=i: x[i : i + 1], stacked), {}
        for name in ('query', 'key', 'value'):
            own |= linear(
                state, f'longformer.encoder.layer.{i}.attention.self.{name}_global', f'global_{name}', ('out', H)
            )
        layer['mixer'] |= jax.tree.map(lambda x: x[None], nested(own))
        layers[str(i)] = layer
    return found | {'encoder': {'layers': layers}}


@pytest.mark.oracle
def test_logits_loss_and_gradients():
    import torch
    import transformers

    # Windows of their own in both layers; their rows are padded from 20 tokens to 24.
    settings = SIZES | {'type_vocab_size': 1, 'layer_norm_eps': 1e-5, 'pad_token_id': 1, 'attention_window': [8, 4]}
    torch.manual_seed(0)
    theirs = transformers.LongformerForMaskedLM(
        transformers.LongformerConfig(**settings | {'max_position_embeddings': 42})
    )
    theirs.eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(3, V, (3, 20)), np.array([20, 13, 7])
    real = np.arange(20) < lengths[:, None]
    tokens = np.where(real, tokens, 1)
    seen = np.zeros((3, 20), np.int32)
    seen[0, [0, 15]] = seen[1, [0, 3]] = seen[2, 2] = 1  # a row may have fewer than there is room for
    targets, weights = rng.integers(0, V, (3, 20)), (real & (rng.random((3, 20)) < 0.4)).astype(np.float32)
    output = theirs(
        torch.tensor(tokens),
        attention_mask=torch.tensor(real.astype(int)),
        global_attention_mask=torch.tensor(seen),
        labels=torch.tensor(np.where(weights > 0, targets, -100)),
    )
    output.loss.backward()
    state = {key: x.detach().numpy() for key, x in theirs.state_dict().items()}
    gradients = {key: x.grad.numpy() for key, x in theirs.named_parameters(remove_duplicate=False)}

    config = longformer(LONG, dataclasses.replace(LONG, window=3))
    logits, loss, found = loss_and_gradients(
        config,
        parameters(state),
        *(jnp.asarray(x) for x in (tokens, targets, weights)),
        segment_ids=jnp.asarray(real.astype(np.int32)),
        positions=jnp.arange(20)[None],
        global_tokens=jnp.asarray(seen),
    )
    close(logits[real], output.logits.detach().numpy()[real], 'logits')
    assert float(loss) == pytest.approx(output.loss.item(), rel=1e-4)
    for (path, gradient), expected in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(parameters(gradients)), strict=True
    ):
        if 'key_bias' not in jax.tree_util.keystr(path):  # zero but for rounding
            close(gradient, expected, jax.tree_util.keystr(path))


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
