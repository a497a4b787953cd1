"""Encoders against transformers' BERT, RoBERTa and ALBERT, and the stored BERT reference: logits, loss, gradients."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llm.models.encoder import Encoder, EncoderConfig
from llm.training.losses import summed_loss
from tests.models.small_encoders import D, F, H, State, V, bert, linear, nested, norm, stacked

pytestmark = pytest.mark.oracle

ATTENTION = {'query': 'self.query', 'key': 'self.key', 'value': 'self.value', 'output': 'output.dense'}


def bert_parameters(state: State, layers: int, heads: int, model: str, head: str) -> dict[str, Any]:
    """BERT's and RoBERTa's names, which differ in `model` ('bert') and in those of the head."""
    embeddings, found = f'{model}.embeddings', {}
    found['embedding/table'] = state[f'{embeddings}.word_embeddings.weight']
    found['positions/table'] = state[f'{embeddings}.position_embeddings.weight']
    found['token_types/table'] = state[f'{embeddings}.token_type_embeddings.weight']
    found |= norm(state, f'{embeddings}.LayerNorm', 'embedding_norm')
    dense, transform = (
        ('lm_head.dense', 'lm_head.layer_norm')
        if head == 'lm_head'
        else (
            'cls.predictions.transform.dense',
            'cls.predictions.transform.LayerNorm',
        )
    )
    found |= linear(state, dense, 'head/dense')
    found |= norm(state, transform, 'head/norm')
    found['head/bias'] = state['lm_head.bias' if head == 'lm_head' else 'cls.predictions.bias']
    every = []
    for i in range(layers):
        name, layer = f'{model}.encoder.layer.{i}', {}
        for ours, theirs in ATTENTION.items():
            cut = ('in' if ours == 'output' else 'out', heads)
            layer |= linear(state, f'{name}.attention.{theirs}', f'mixer/{ours}', cut)
        layer |= norm(state, f'{name}.attention.output.LayerNorm', 'mixer_norm')
        layer |= linear(state, f'{name}.intermediate.dense', 'feed_forward/up')
        layer |= linear(state, f'{name}.output.dense', 'feed_forward/down')
        layer |= norm(state, f'{name}.output.LayerNorm', 'feed_forward_norm')
        every.append(layer)
    return nested(found | stacked(every, 'encoder/layers/0'))


def albert_parameters(state: State, heads: int) -> dict[str, Any]:
    """ALBERT with one group of one layer."""
    found: dict[str, np.ndarray] = {}
    for ours, theirs in {'embedding': 'word', 'positions': 'position', 'token_types': 'token_type'}.items():
        found[f'{ours}/table'] = state[f'albert.embeddings.{theirs}_embeddings.weight']
    found |= norm(state, 'albert.embeddings.LayerNorm', 'embedding_norm')
    found |= linear(state, 'albert.encoder.embedding_hidden_mapping_in', 'widen')
    found |= linear(state, 'predictions.dense', 'head/dense')
    found |= norm(state, 'predictions.LayerNorm', 'head/norm')
    found['head/bias'] = state['predictions.bias']
    name, layer = 'albert.encoder.albert_layer_groups.0.albert_layers.0', {}
    for ours, theirs in {'query': 'query', 'key': 'key', 'value': 'value', 'output': 'dense'}.items():
        cut = ('in' if ours == 'output' else 'out', heads)
        layer |= linear(state, f'{name}.attention.{theirs}', f'mixer/{ours}', cut)
    layer |= norm(state, f'{name}.attention.LayerNorm', 'mixer_norm')
    layer |= linear(state, f'{name}.ffn', 'feed_forward/up')
    layer |= linear(state, f'{name}.ffn_output', 'feed_forward/down')
    layer |= norm(state, f'{name}.full_layer_layer_norm', 'feed_forward_norm')
    return nested(found | stacked([layer], 'encoder/layers/0'))


SIZES = {
    'vocab_size': V,
    'hidden_size': D,
    'num_hidden_layers': 2,
    'num_attention_heads': H,
    'intermediate_size': F,
    'max_position_embeddings': 40,
    'hidden_dropout_prob': 0.0,
    'attention_probs_dropout_prob': 0.0,
    'initializer_range': 0.2,
}
ALBERT = bert(3)
ALBERT = dataclasses.replace(
    ALBERT,
    embedding_size=16,
    layers=dataclasses.replace(
        ALBERT.layers,
        shared_layers=True,
        pattern=tuple(
            dataclasses.replace(x, feed_forward=dataclasses.replace(x.feed_forward, activation='gelu_tanh'))
            for x in ALBERT.layers.pattern
        ),
    ),
    head=dataclasses.replace(ALBERT.head, activation='gelu_tanh'),
)
# Ours, transformers' (model, config, settings), and the first as the second's weights; each with how padding is told.
FAMILIES: dict[str, tuple[EncoderConfig, str, dict[str, Any], Callable[[State], dict[str, Any]]]] = {
    'Bert': (bert(), 'BertConfig', SIZES, lambda state: bert_parameters(state, 2, H, 'bert', 'cls')),
    'Roberta': (
        bert(epsilon=1e-5, token_types=1, first_position=2, max_positions=42),
        'RobertaConfig',
        SIZES | {'type_vocab_size': 1, 'layer_norm_eps': 1e-5, 'pad_token_id': 1, 'max_position_embeddings': 42},
        lambda state: bert_parameters(state, 2, H, 'roberta', 'lm_head'),
    ),
    'Albert': (
        ALBERT,
        'AlbertConfig',
        SIZES | {'embedding_size': 16, 'num_hidden_layers': 3},
        lambda state: albert_parameters(state, H),
    ),
}


def close(ours: Any, theirs: Any, what: str) -> None:
    """Within 1e-4 of the largest value."""
    theirs = np.asarray(theirs)
    assert np.shape(ours) == theirs.shape, what
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max(), err_msg=what)


def loss_and_gradients(config: EncoderConfig, params: Any, inputs: Any, targets: Any, weights: Any, **more: Any) -> Any:
    """Logits; the mean loss and its gradient, as training computes them."""
    graph = nnx.split(Encoder(config))[0]

    def loss(params: Any) -> jax.Array:
        model = nnx.merge(graph, params)
        hidden = model.hidden(inputs, **more)
        return summed_loss(model.projection(), hidden, targets, weights)[0] / weights.sum()

    logits = jax.jit(lambda params: nnx.merge(graph, params)(inputs, **more))(params)
    return logits, *jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize('name', FAMILIES)
def test_logits_loss_and_gradients(name):
    import torch
    import transformers

    config, kind, settings, parameters = FAMILIES[name]
    torch.manual_seed(0)
    theirs = getattr(transformers, f'{name}ForMaskedLM')(getattr(transformers, kind)(**settings)).eval()
    with torch.no_grad():  # biases start at zero and scales at one
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(3, V, (3, 20)), np.array([20, 13, 7])
    real = np.arange(20) < lengths[:, None]
    tokens = np.where(real, tokens, settings.get('pad_token_id', 0))
    types = np.where((np.arange(20) > 5) & real, settings.get('type_vocab_size', 2) - 1, 0)
    targets, weights = rng.integers(0, V, (3, 20)), (real & (rng.random((3, 20)) < 0.4)).astype(np.float32)
    output = theirs(
        torch.tensor(tokens),
        attention_mask=torch.tensor(real.astype(int)),
        token_type_ids=torch.tensor(types),
        labels=torch.tensor(np.where(weights > 0, targets, -100)),
    )
    output.loss.backward()
    # A tied parameter goes by several names, but its gradient is all that reached it.
    state = {key: x.detach().numpy() for key, x in theirs.state_dict().items()}
    gradients = {key: x.grad.numpy() for key, x in theirs.named_parameters(remove_duplicate=False)}

    ours = loss_and_gradients(
        config,
        parameters(state),
        *(jnp.asarray(x) for x in (tokens, targets, weights)),
        segment_ids=jnp.asarray(real.astype(np.int32)),
        token_types=jnp.asarray(types),
        positions=jnp.arange(20)[None],
    )
    close(ours[0][real], output.logits.detach().numpy()[real], 'logits')
    assert float(ours[1]) == pytest.approx(output.loss.item(), rel=1e-4)
    for (path, gradient), expected in zip(
        jax.tree.leaves_with_path(ours[2]), jax.tree.leaves(parameters(gradients)), strict=True
    ):
        # A key's bias shifts all scores of a query alike: its gradient is zero but for rounding.
        if 'key_bias' not in jax.tree_util.keystr(path):
            close(gradient, expected, jax.tree_util.keystr(path))


def test_the_stored_bert(dev_data):
    from safetensors.numpy import load_file

    folder = dev_data / 'oracles' / 'bert'
    settings, expected = (json.loads((folder / name).read_text()) for name in ('config.json', 'ref.json'))
    reference = np.load(folder / 'ref.npz')
    heads, layers = settings['num_attention_heads'], settings['num_hidden_layers']
    config = bert(
        layers,
        vocab=settings['vocab_size'],
        width=settings['hidden_size'],
        heads=heads,
        d_ff=settings['intermediate_size'],
        max_positions=settings['max_position_embeddings'],
    )
    params = bert_parameters(load_file(folder / 'model.safetensors'), layers, heads, 'bert', 'cls')
    tokens = jnp.asarray(reference['input_ids'])
    logits, loss, gradients = loss_and_gradients(
        config,
        params,
        tokens,
        tokens,  # the reference's labels
        jnp.ones(tokens.shape),
    )
    close(logits, reference['logits'], 'logits')
    assert float(loss) == pytest.approx(expected['loss'], rel=1e-5)
    norms = {
        path: float(np.linalg.norm(np.asarray(x)))
        for path, x in (
            ('embeddings.word_embeddings.weight', gradients['embedding']['table']),
            ('embeddings.token_type_embeddings.weight', gradients['token_types']['table']),
            ('encoder.layer.0.attention.self.value.weight', gradients['encoder']['layers']['0']['mixer']['value'][0]),
            ('encoder.layer.1.output.dense.weight', gradients['encoder']['layers']['0']['feed_forward']['down'][1]),
        )
    }
    for name, value in norms.items():
        assert value == pytest.approx(expected['grad_norms'][f'bert.{name}'], rel=1e-4), name
