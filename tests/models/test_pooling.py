"""One vector of a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llm.errors import UserError
from llm.models.pooling import PoolingConfig, pool

_HIDDEN = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)
# Padding after the text, before it, in the middle of it, and nothing but padding.
_REAL = np.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 0, 1, 0], [0, 0, 0, 0, 0]], bool)


def test_each_kind_reads_real_tokens_only() -> None:
    padded = np.where(_REAL[:, :, None], _HIDDEN, np.inf)
    first = np.stack([_HIDDEN[0, 0], _HIDDEN[1, 2], _HIDDEN[2, 0], np.zeros(3)])
    last = np.stack([_HIDDEN[0, 2], _HIDDEN[1, 4], _HIDDEN[2, 3], np.zeros(3)])
    mean = np.stack([_HIDDEN[0, :3].mean(0), _HIDDEN[1, 2:].mean(0), _HIDDEN[2, [0, 3]].mean(0), np.zeros(3)])
    for kind, expected in (('first', first), ('last', last), ('mean', mean)):
        config = PoolingConfig(kind)  # type: ignore[arg-type]
        np.testing.assert_allclose(pool(jnp.asarray(padded), jnp.asarray(_REAL), config), expected, atol=1e-6)


def test_normalized_vectors_and_their_gradients_are_those_of_torch() -> None:
    def score(hidden: jax.Array) -> jax.Array:
        return jnp.sum(pool(hidden, jnp.asarray(_REAL), PoolingConfig('mean', normalize=True))[:3, 0])

    vectors = pool(jnp.asarray(_HIDDEN), jnp.asarray(_REAL), PoolingConfig('mean', normalize=True))
    theirs = torch.tensor(_HIDDEN, requires_grad=True)
    weights = torch.tensor(_REAL / np.maximum(_REAL.sum(1, keepdims=True), 1), dtype=torch.float32)
    expected = torch.nn.functional.normalize(torch.einsum('bs,bsd->bd', weights, theirs), dim=-1)
    expected[:3, 0].sum().backward()
    np.testing.assert_allclose(vectors, expected.detach().numpy(), atol=1e-6)
    assert theirs.grad is not None
    np.testing.assert_allclose(jax.grad(score)(jnp.asarray(_HIDDEN)), theirs.grad.numpy(), atol=1e-6)


def test_vectors_of_low_precision_states_are_float32() -> None:
    assert pool(jnp.asarray(_HIDDEN, jnp.bfloat16), jnp.asarray(_REAL)).dtype == jnp.float32


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UserError, match="kind is 'max'"):
        PoolingConfig('max')  # type: ignore[arg-type]
