"""The encoder-decoder against transformers' T5, both versions: logits, loss, gradients, greedy decoding."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llm.training.losses import summed_loss
from tests.models.small_encoders import D, F, H, K, State, V, linear, nested, norm, stacked, t5

pytestmark = pytest.mark.oracle

ATTENTION = {'query': 'q', 'key': 'k', 'value': 'v', 'output': 'o'}
START, END, B, S, T = 0, 1, 3, 9, 14


def t5_parameters(state: State, layers: int) -> dict[str, Any]:
    """Either version: gated feed-forward layers have wi_0 and wi_1, untied models lm_head."""
    found = {'embedding/table': state['shared.weight']}
    if not np.array_equal(state.get('lm_head.weight', state['shared.weight']), state['shared.weight']):
        found['head/kernel'] = state['lm_head.weight'].T
    for side in ('encoder', 'decoder'):
        bias = 'block.0.layer.0.SelfAttention.relative_attention_bias.weight'
        found[f'{side}/relative_bias/table'] = state[f'{side}.{bias}']
        found |= norm(state, f'{side}.final_layer_norm', f'{side}/final_norm')
        every = []
        for i in range(layers):
            layer, name = {}, f'{side}.block.{i}.layer'
            parts = {'mixer': '0.SelfAttention'} | ({'cross': '1.EncDecAttention'} if side == 'decoder' else {})
            for part, theirs in parts.items():
                for our_name, their_name in ATTENTION.items():
                    cut = ('in' if our_name == 'output' else 'out', H)
                    layer |= linear(state, f'{name}.{theirs}.{their_name}', f'{part}/{our_name}', cut)
                layer |= norm(state, f'{name}.{theirs[0]}.layer_norm', f'{part}_norm')
            last = f'{name}.{len(parts)}'
            gated = f'{last}.DenseReluDense.wi_0.weight' in state
            names = {'gate': 'wi_0', 'up': 'wi_1', 'down': 'wo'} if gated else {'up': 'wi', 'down': 'wo'}
            for our_name, their_name in names.items():
                layer |= linear(state, f'{last}.DenseReluDense.{their_name}', f'feed_forward/{our_name}')
            layer |= norm(state, f'{last}.layer_norm', 'feed_forward_norm')
            every.append(layer)
        found |= stacked(every, f'{side}/layers/0')
    return nested(found)


def close(ours: Any, theirs: Any, what: str) -> None:
    """Within 1e-4 of the largest value."""
    theirs = np.asarray(theirs)
    assert np.shape(ours) == theirs.shape, what
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max(), err_msg=what)


@pytest.mark.parametrize('gated', [True, False], ids=['v1.1', 'v1.0'])
def test_logits_loss_gradients_and_greedy_decoding(gated):
    import torch
    import transformers

    torch.manual_seed(0)
    settings = transformers.T5Config(
        vocab_size=V,
        d_model=D,
        d_kv=K,
        d_ff=F,
        num_layers=2,
        num_heads=H,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        dropout_rate=0.0,
        feed_forward_proj='gated-gelu' if gated else 'relu',
        tie_word_embeddings=not gated,
        decoder_start_token_id=START,
        eos_token_id=END,
        pad_token_id=START,
    )
    theirs = transformers.T5ForConditionalGeneration(settings).eval()
    if gated:  # transformers ties all embeddings whatever it is told
        theirs.lm_head.weight = torch.nn.Parameter(torch.randn(V, D))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        theirs.shared.weight.mul_(0.3)  # else a tied model says again what it reads
    theirs = theirs.double()  # scores are not scaled, and make much of the last digits of float32
    rng = np.random.default_rng(0)
    lengths = np.array([T, 9, 5])
    real = np.arange(T) < lengths[:, None]
    sources = np.where(real, rng.integers(2, V, (B, T)), START)
    targets, weights = rng.integers(2, V, (B, S)), np.ones((B, S), np.float32)
    weights[1, 6:] = 0
    inputs = np.concatenate([np.full((B, 1), START), targets[:, :-1]], axis=1)
    output = theirs(
        torch.tensor(sources),
        attention_mask=torch.tensor(real.astype(int)),
        decoder_input_ids=torch.tensor(inputs),
        labels=torch.tensor(np.where(weights > 0, targets, -100)),
    )
    output.loss.backward()
    state = {key: x.detach().numpy() for key, x in theirs.state_dict().items()}
    gradients = {key: x.grad.numpy() for key, x in theirs.named_parameters(remove_duplicate=False)}

    config = t5(gated=gated)
    sides = {
        'encoder_inputs': jnp.asarray(sources),
        'encoder_segment_ids': jnp.asarray(real.astype(np.int32)),
        'segment_ids': jnp.ones((B, S), jnp.int32),
    }
    with jax.enable_x64():
        double = nnx.split(dataclasses.replace(config, compute_dtype='float64').build())[0]

        def loss(params: Any) -> Any:
            model = nnx.merge(double, params)
            hidden = model.hidden(jnp.asarray(inputs), **sides)
            total = summed_loss(model.projection(), hidden, jnp.asarray(targets), jnp.asarray(weights))[0]
            return total / weights.sum(), model.projection()(hidden)

        (value, logits), found = jax.jit(jax.value_and_grad(loss, has_aux=True))(t5_parameters(state, 2))
        close(logits, output.logits.detach().numpy(), 'logits')
        assert float(value) == pytest.approx(output.loss.item(), rel=1e-4)
        for (path, gradient), expected in zip(
            jax.tree.leaves_with_path(found), jax.tree.leaves(t5_parameters(gradients, 2)), strict=True
        ):
            close(gradient, expected, jax.tree_util.keystr(path))

    graph, params = nnx.split(config.build())[0], t5_parameters(state, 2)
    steps = 12
    decoded = theirs.generate(
        torch.tensor(sources),
        attention_mask=torch.tensor(real.astype(int)),
        max_new_tokens=steps,
        min_new_tokens=steps,  # so that no row ends before
        do_sample=False,
        num_beams=1,
    ).numpy()[:, 1:]

    @jax.jit
    def greedy(params: Any) -> jax.Array:
        model = nnx.merge(graph, params)
        ids = sides['encoder_segment_ids']
        memory = model.encode(sides['encoder_inputs'], segment_ids=ids)
        cache = model.init_cache(memory, steps, ids)

        def step(carry: Any, index: jax.Array) -> Any:
            token, cache = carry
            logits, cache = model.decode(token, cache, index)
            token = jnp.argmax(logits.at[..., END].set(-jnp.inf), axis=-1)
            return (token, cache), token[:, 0]

        start = jnp.full((B, 1), START)
        return jax.lax.scan(step, (start, cache), jnp.arange(steps))[1].T

    np.testing.assert_array_equal(greedy(params), decoded)
    assert len(np.unique(decoded)) > 3
