"""A product with a weight, whose gradient for the weight is written so that CPUs compute it fast.

JAX's own rule for that gradient is the product's transpose, then transposed back. XLA:CPU merges the two into a product
that none of its fast kernels take, and copies the incoming gradient for it by strides, together with the elementwise
work before. A gradient of 1 GFLOP in fp32 on one core takes 12 ms for 20, and 26 for 50 with a tanh before and the
gradient of x beside it; whole training steps: docs/decisions.md, "Gradients of weights on CPUs".
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def project(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """jnp.einsum(equation, x, weight), for equations in which each letter stands in exactly two of the three terms.

    Shapes: as 'BSD,DF->BSF' says.
    """
    return jnp.einsum(equation, x, weight)


def _forward(equation: str, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return jnp.einsum(equation, x, weight), (x, weight)


def _backward(equation: str, kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = kept
    inputs, output = equation.split('->')
    of_x, of_weight = inputs.split(',')
    return (
        jnp.einsum(f'{output},{of_weight}->{of_x}', gradient, weight),
        jnp.einsum(f'{of_x},{output}->{of_weight}', x, gradient),
    )


project.defvjp(_forward, _backward)
