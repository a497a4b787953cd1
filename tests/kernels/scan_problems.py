"""Recurrences drawn at random, and how an implementation's value and gradients are taken."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.models.small_decoders import compiled

Arrays = dict[str, np.ndarray]
TOPOLOGIES = {'v4': 'v4:2x2x1', 'v5e': 'v5e:2x2', 'v5p': 'v5p:2x2x1', 'v6e': 'v6e:2x2', 'tpu7x': 'tpu7x:2x2x1'}


@st.composite
def selective_scans(draw: st.DrawFn) -> Arrays:
    """Arguments of `selective_scan`; short, so that with short chunks every path through them is met."""
    batch, channels, state = (draw(st.integers(1, n)) for n in (2, 3, 4))
    length = draw(st.sampled_from((1, 2, 7, 13, 20, 33)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    arrays = {
        'x': rng.standard_normal((batch, length, channels)),
        'dt': rng.uniform(0, 1, (batch, length, channels)),
        'a': -rng.uniform(0.1, 3, (channels, state)),
        'b': rng.standard_normal((batch, length, state)),
        'c': rng.standard_normal((batch, length, state)),
    }
    return _with_options(draw, rng, arrays, (batch, state, channels))


@st.composite
def ssds(draw: st.DrawFn) -> Arrays:
    """Arguments of `ssd`."""
    batch, groups, share, size, state = (draw(st.integers(1, n)) for n in (2, 2, 3, 3, 4))
    length = draw(st.sampled_from((1, 2, 7, 13)))
    heads = groups * share
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    arrays = {
        'x': rng.standard_normal((batch, length, heads, size)),
        'dt': rng.uniform(0, 1, (batch, length, heads)),
        'a': -rng.uniform(0.1, 3, heads),
        'b': rng.standard_normal((batch, length, groups, state)),
        'c': rng.standard_normal((batch, length, groups, state)),
    }
    return _with_options(draw, rng, arrays, (batch, heads, size, state))


def _with_options(draw: st.DrawFn, rng: np.random.Generator, arrays: Arrays, state: tuple[int, ...]) -> Arrays:
    batch, length = arrays['x'].shape[:2]
    if draw(st.booleans()):
        arrays['initial_state'] = rng.standard_normal(state)
    if draw(st.booleans()):
        arrays['segment_ids'] = np.sort(rng.integers(0, 3, (batch, length)))
    if draw(st.booleans()):  # padding after the end of each row
        real = np.arange(length) < rng.integers(1, length + 1, (batch, 1))
        arrays['dt'] = arrays['dt'] * real[..., None]
    return arrays


def value_and_gradients(run: Callable[..., Any], arrays: Arrays, dtype: Any) -> dict[str, np.ndarray]:
    """y, the last state, and the gradients of a weighted sum of both in every argument of floats."""
    ids = {name: jnp.asarray(x) for name, x in arrays.items() if x.dtype.kind == 'i'}
    floats = {name: jnp.asarray(x, dtype) for name, x in arrays.items() if name not in ids}

    @compiled
    def both(floats: dict[str, jax.Array]) -> dict[str, jax.Array]:
        outputs, pullback = jax.vjp(lambda floats: run(**floats, **ids), floats)
        rng = np.random.default_rng(0)
        weights = [jnp.asarray(rng.standard_normal(each.shape), each.dtype) for each in outputs]
        return {'y': outputs[0], 'final': outputs[1], **pullback(tuple(weights))[0]}

    return {name: np.asarray(x) for name, x in both(floats).items()}


def assert_close(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    """Each array within `tolerance` of the largest value of what is expected."""
    assert actual.keys() == expected.keys()
    for name, exact in expected.items():
        np.testing.assert_allclose(
            actual[name], exact, rtol=0, atol=tolerance * max(1.0, np.abs(exact).max()), err_msg=name
        )


def kernel_calls(run: Callable[..., Any], chip: str, arrays: dict[str, tuple[Any, ...]], state: tuple[int, ...]) -> int:
    """How many TPU kernels the program for `chip` has that runs and differentiates `run`, on packed rows.

    Args:
        arrays: shape and dtype of each argument, x first; state: shape of a state.
    """
    device = topologies.get_topology_desc(platform='tpu', topology_name=TOPOLOGIES[chip]).devices[0]
    sharding = NamedSharding(Mesh(np.array([device]), ('one',)), PartitionSpec())

    def array(*shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    floats = {name: array(*shape, dtype=dtype) for name, (*shape, dtype) in arrays.items()}
    floats['initial_state'] = array(*state, dtype=jnp.float32)
    ids = array(*floats['x'].shape[:2], dtype=jnp.int32)

    def both(floats: Any, ids: Any, cotangents: Any) -> Any:
        outputs, pullback = jax.vjp(lambda floats: run(**floats, segment_ids=ids, device=device), floats)
        return outputs, pullback(cotangents)

    program = jax.jit(both).lower(floats, ids, (floats['x'], floats['initial_state'])).compile()
    return program.as_text().count('custom_call_target="tpu_custom_call"')
