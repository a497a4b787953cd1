import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm.training.losses import summed_loss, token_negative_log_likelihood


def _example(dtype=jnp.float64):
    generator = np.random.default_rng(0)
    logits = jnp.asarray(generator.normal(size=(2, 5, 11)) * 3, dtype)
    targets = jnp.asarray(generator.integers(0, 11, size=(2, 5)), jnp.int32)
    weights = jnp.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], dtype)
    return logits, targets, weights


def test_value_and_gradient_equal_optax():
    with jax.enable_x64():
        logits, targets, weights = _example()

        def ours(logits):
            return summed_loss(logits, targets, weights)[0]

        def theirs(logits):
            return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights)

        np.testing.assert_allclose(ours(logits), theirs(logits), rtol=1e-13)
        np.testing.assert_allclose(jax.grad(ours)(logits), jax.grad(theirs)(logits), rtol=1e-11, atol=1e-14)


def test_z_loss_equals_its_definition_and_differentiates():
    with jax.enable_x64():
        logits, targets, weights = _example()

        def ours(logits):
            return summed_loss(logits, targets, weights, z_loss=0.1)[0]

        def definition(logits):
            log_z = jnp.log(jnp.sum(jnp.exp(logits), -1))
            nll = log_z - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
            return jnp.sum((nll + 0.1 * log_z**2) * weights)

        np.testing.assert_allclose(ours(logits), definition(logits), rtol=1e-13)
        np.testing.assert_allclose(jax.grad(ours)(logits), jax.grad(definition)(logits), rtol=1e-11, atol=1e-14)


def test_padding_adds_nothing():
    logits, targets, weights = _example(jnp.float32)
    changed = jnp.where(weights[..., None] > 0, logits, 1e4)
    before, after = summed_loss(logits, targets, weights)[1], summed_loss(changed, targets, weights)[1]
    assert {k: float(v) for k, v in before.items()} == {k: float(v) for k, v in after.items()}
    assert float(before['tokens']) == 7


def test_large_logits_stay_finite():
    logits = jnp.asarray([[[1e4, -1e4, 0.0]]])
    nll, log_z = token_negative_log_likelihood(logits, jnp.asarray([[1]]))
    assert float(nll[0, 0]) == 2e4 and float(log_z[0, 0]) == 1e4
