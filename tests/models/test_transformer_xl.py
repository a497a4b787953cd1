"""Transformer-XL against the equations of its paper, pair by pair; decoding, and rows that go on from one another."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llm.errors import UserError
from llm.models.attention import AttentionConfig
from llm.models.decoder import DecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.layer import LayerConfig
from llm.models.normalization import NormConfig
from llm.models.recurrent_attention import RecurrentAttentionConfig
from tests.models.small_encoders import built

V, D, H, K, L, B, S, M = 11, 8, 2, 4, 2, 2, 4, 6
NORM = NormConfig('layer', 1e-5, bias=True)
MIXER = RecurrentAttentionConfig(H, H, K, memory_length=M)
LAYER = LayerConfig(MIXER, FeedForwardConfig(12, 'relu', bias=True), NORM, 'post')
CONFIG = DecoderConfig(
    V, D, L, (LAYER,), final_norm=None, position='none', tied_embeddings=True, embedding_multiplier=None
)
TOKENS = np.random.default_rng(0).integers(0, V, (B, 3 * S))


def by_equations(p: Any, tokens: Any, memory: list[Any]) -> tuple[Any, list[Any]]:
    """Logits of one row of tokens, and what each layer read: the model of section 3.3, a pair at a time, in torch.

    Args:
        p: parameters, layers along the first axis. memory: of each layer a list of vectors, oldest first.
    """
    import torch

    def sinusoid(distance: int) -> Any:
        angles = [distance * 10_000.0 ** (-2 * i / D) for i in range(D // 2)]
        return torch.tensor([f(angle) for angle in angles for f in (math.sin, math.cos)], dtype=torch.float64)

    def norm(x: Any, scale: Any, offset: Any) -> Any:
        return (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + 1e-5) * scale + offset

    table, layers = p['embedding']['table'], p['layers']['0']
    states, read = [table[token] * math.sqrt(D) for token in tokens], []
    for n in range(L):
        layer = {name: {key: x[n] for key, x in part.items()} for name, part in layers.items()}
        mixer, feed = layer['mixer'], layer['feed_forward']
        extended = [x.detach() for x in memory[n]] + states
        read.append(extended[-M:])
        new = []
        for i in range(len(states)):
            place, mixed = len(memory[n]) + i, torch.zeros(D, dtype=torch.float64)
            for h in range(H):
                query = extended[place] @ mixer['query'][:, h]
                scores = []
                for j in range(place + 1):
                    key = extended[j] @ mixer['key'][:, h]
                    position = sinusoid(place - j) @ mixer['relative_key'][:, h]
                    content = (query + mixer['content_bias'][h]) @ key
                    scores.append((content + (query + mixer['position_bias'][h]) @ position) / math.sqrt(K))
                weights = torch.softmax(torch.stack(scores), dim=0)
                values = torch.stack([x @ mixer['value'][:, h] for x in extended[: place + 1]])
                mixed = mixed + (weights @ values) @ mixer['output'][h]
            x = norm(states[i] + mixed, layer['mixer_norm']['scale'], layer['mixer_norm']['bias'])
            y = torch.relu(x @ feed['up'] + feed['up_bias']) @ feed['down'] + feed['down_bias']
            new.append(norm(x + y, layer['feed_forward_norm']['scale'], layer['feed_forward_norm']['bias']))
        states = new
    return torch.stack(states) @ table.T, read


@pytest.mark.oracle
def test_logits_and_gradients_of_rows_that_go_on_from_one_another():
    import torch

    with jax.enable_x64():
        graph, params = built(dataclasses.replace(CONFIG, compute_dtype='float64'))
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        theirs = jax.tree.map(lambda x: torch.tensor(np.asarray(x), requires_grad=True), params)
        weight = np.random.default_rng(1).standard_normal((B, S, V))

        @jax.jit
        def run(params: Any, tokens: Any, memory: Any, first: Any) -> Any:
            def loss(params: Any) -> Any:
                model = nnx.merge(graph, params)
                positions = jnp.broadcast_to(first + jnp.arange(S), (B, S))
                hidden, _, new = model.hidden_sums_and_memory(tokens, memory, positions=positions)
                logits = model.logits(hidden)
                return jnp.sum(logits * weight), (logits, new)

            (_, found), gradients = jax.value_and_grad(loss, has_aux=True)(params)
            return *found, gradients

        memory: Any = dataclasses.replace(CONFIG, compute_dtype='float64').init_memory(B)
        remembered: list[list[Any]] = [[[] for _ in range(L)] for _ in range(B)]
        for part in range(3):
            tokens = TOKENS[:, part * S : (part + 1) * S]
            logits, memory, gradients = run(params, jnp.asarray(tokens), memory, part * S)
            rows = []
            for b in range(B):
                row, remembered[b] = by_equations(theirs, tokens[b].tolist(), remembered[b])
                rows.append(row)
            np.testing.assert_allclose(logits, torch.stack(rows).detach().numpy(), rtol=0, atol=1e-9)
        torch.sum(torch.stack(rows) * torch.tensor(weight)).backward()
        for (path, ours), exact in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(theirs), strict=True):
            assert exact.grad.abs().max() > 1e-6, path
            np.testing.assert_allclose(ours, exact.grad.numpy(), rtol=0, atol=1e-9, err_msg=jax.tree_util.keystr(path))


def test_decoding_and_short_rows_give_what_a_long_row_gives():
    """A memory that is long enough leaves nothing out."""
    mixer = dataclasses.replace(MIXER, memory_length=3 * S)
    config = dataclasses.replace(CONFIG, pattern=(dataclasses.replace(LAYER, mixer=mixer),))
    graph, params = built(config)
    tokens = jnp.asarray(TOKENS)

    @jax.jit
    def run(params: Any) -> Any:
        model = nnx.merge(graph, params)
        memory, parts = config.init_memory(B), []
        for part in range(3):
            positions = jnp.broadcast_to(part * S + jnp.arange(S), (B, S))
            row = tokens[:, part * S : (part + 1) * S]
            hidden, _, memory = model.hidden_sums_and_memory(row, memory, positions=positions)
            parts.append(model.logits(hidden))
        cache = model.init_cache(B, 3 * S + 1)
        first, cache = model.decode(tokens[:, :5], cache, 0)
        second, cache = model.decode(tokens[:, 5:11], cache, jnp.full((B,), 5))
        third, _ = model.decode(tokens[:, 11:], cache, jnp.asarray(11))
        return model(tokens), jnp.concatenate(parts, axis=1), jnp.concatenate([first, second, third], axis=1)

    whole, by_rows, decoded = run(params)
    np.testing.assert_allclose(by_rows, whole, rtol=0, atol=2e-5)
    np.testing.assert_allclose(decoded, whole, rtol=0, atol=2e-5)


def test_a_new_document_sees_nothing_of_the_memory():
    graph, params = built(CONFIG)
    tokens, ids = jnp.asarray(TOKENS[:, :S]), jnp.asarray([[1, 1, 2, 2], [1, 1, 1, 0]])
    memory = jax.tree.map(lambda x: x + 1.0, CONFIG.init_memory(B))
    positions = jnp.asarray([[5, 6, 0, 1], [0, 1, 2, 0]])  # the first row goes on, the second does not
    model = nnx.merge(graph, params)
    found = model.hidden_sums_and_memory(tokens, memory, positions=positions, segment_ids=ids)[0]
    alone = model.hidden(tokens, segment_ids=ids)
    same = np.isclose(found, alone, rtol=0, atol=1e-5).all(-1)
    np.testing.assert_array_equal(same, [[False, False, True, True], [True] * 4])


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: RecurrentAttentionConfig(2, 2, 8), 'memory_length is 0'),
        (lambda: dataclasses.replace(MIXER, num_kv_heads=1), 'a key and value head for each'),
        (lambda: dataclasses.replace(MIXER, causal=False), 'is causal'),
        (lambda: dataclasses.replace(MIXER, window=3), 'no window'),
        (lambda: dataclasses.replace(CONFIG, position='rope').build(), 'positions of its own'),
        (
            lambda: dataclasses.replace(
                CONFIG, pattern=(LAYER, dataclasses.replace(LAYER, mixer=AttentionConfig(H, H, K)))
            ),
            r'layers remember \[0, 6\] tokens',
        ),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()
