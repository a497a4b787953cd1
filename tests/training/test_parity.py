"""What the parity matrix leaves out: grouped queries, layers left over, capped and scaled logits, the expert axis.

As there, loss and gradients in float64 are within 1e-9 of one device's, and the collectives are in the program.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.errors import UserError
from llm.models.attention import AttentionConfig
from llm.models.decoder import DecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.layer import LayerConfig
from llm.parallel.mesh import MeshConfig
from llm.training.optimizers import OptimizerConfig
from llm.training.step import StepConfig
from llm.training.trainer import Trainer
from tests.compiling import QUICKLY
from tests.training.parity_cases import BATCH, GRADIENT, LENGTH, batch

LAYER = LayerConfig(
    mixer=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    feed_forward=FeedForwardConfig(d_ff=64),
)
WINDOWED = dataclasses.replace(LAYER, mixer=dataclasses.replace(LAYER.mixer, window=5))
MODEL = DecoderConfig(vocab_size=64, d_model=32, num_layers=3, pattern=(LAYER, WINDOWED), compute_dtype='float64')
# Whatever the loss can do: a kernel that is the table's transpose, a factor and a cap.
CAPPED = dataclasses.replace(MODEL, tied_embeddings=True, final_logit_soft_cap=1.5, mup_base_width=64)

MESHES = {
    'tensor': MeshConfig(data=1, tensor=2),  # with fewer devices than there are
    'data x fsdp x tensor': MeshConfig(data=2, fsdp=2, tensor=2),
}
# What XLA must have put into the program for a mesh axis to have done anything. XLA:CPU writes a reduce-scatter as
# an all-reduce whose result is sliced.
COLLECTIVES = {'data': ('all-reduce',), 'fsdp': ('all-gather', 'all-reduce'), 'tensor': ('all-reduce',)}


def _to_float64(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, tree)


@functools.cache
def _initial_state(model: DecoderConfig):
    trainer = Trainer(model, GRADIENT, StepConfig(BATCH, LENGTH), total_steps=10, devices=jax.devices()[:1])
    return jax.device_get(_to_float64(trainer.fresh_state()))


@functools.cache
def _run(mesh: MeshConfig, accumulation: int, scan: bool, packed: bool, model: DecoderConfig = MODEL):
    """(loss, gradients, HLO text) of one step in float64."""
    with jax.enable_x64():
        trainer = Trainer(
            dataclasses.replace(model, scan_layers=scan),
            GRADIENT,
            StepConfig(BATCH, LENGTH, accumulation, z_loss=1e-3),
            total_steps=10,
            mesh=mesh,
            devices=jax.devices()[: np.prod(mesh.sizes(8)) if mesh.data != -1 else 1],
        )
        state = jax.device_put(_initial_state(model), trainer.state_shardings)
        rows = jax.device_put(batch(packed), trainer.batch_sharding)
        before = jax.device_get(state['parameters'])
        compiled = trainer.train_step.lower(state, rows).compile(QUICKLY)
        state, metrics = compiled(state, rows)
        gradients = jax.tree.map(lambda old, new: old - np.asarray(new), before, jax.device_get(state['parameters']))
        return float(metrics['loss']), gradients, compiled.as_text()


@pytest.mark.parametrize(
    ('accumulation', 'scan', 'packed'),
    [(1, True, False), (2, False, True)],
    ids=['scan-whole', 'accumulated-unrolled-packed'],
)
@pytest.mark.parametrize('name', MESHES)
def test_meshes_agree_with_one_device(name, accumulation, scan, packed):
    program = _agrees_with_one_device(MESHES[name], accumulation, scan, packed, MODEL)
    for axis in name.split(' x '):
        for collective in COLLECTIVES[axis]:
            assert f'{collective}(' in program or f'{collective}-start(' in program, f'{axis} needs {collective}'


@pytest.mark.parametrize(
    'mesh',
    [
        MeshConfig(data=2, fsdp=2, tensor=2),
        MeshConfig(data=1, fsdp=2, sequence=2, tensor=2),
        MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
    ],
    ids=str,
)
def test_tied_capped_and_scaled_logits_agree_with_one_device(mesh):
    _agrees_with_one_device(mesh, 2, True, True, CAPPED)


def _agrees_with_one_device(mesh: MeshConfig, accumulation: int, scan: bool, packed: bool, model: DecoderConfig) -> str:
    """Compares loss and gradients; gives the HLO text."""
    loss, gradients, _ = _run(MeshConfig(), 1, True, packed, model)
    parallel_loss, parallel_gradients, program = _run(mesh, accumulation, scan, packed, model)
    # The metric is stored in fp32.
    assert parallel_loss == pytest.approx(loss, rel=1e-7)
    for path, expected in jax.tree_util.tree_leaves_with_path(gradients):
        actual = functools.reduce(lambda tree, key: tree[key.key], path, parallel_gradients)
        np.testing.assert_allclose(
            actual, expected, rtol=0, atol=1e-9 * np.abs(expected).max(), err_msg=jax.tree_util.keystr(path)
        )
    return program


@pytest.mark.parametrize('accumulation', [2, 8])
def test_accumulation_changes_nothing(accumulation):
    loss, gradients, _ = _run(MeshConfig(), 1, True, True)
    other_loss, other_gradients, _ = _run(MeshConfig(), accumulation, True, True)
    assert other_loss == pytest.approx(loss, rel=1e-7)
    for expected, actual in zip(jax.tree.leaves(gradients), jax.tree.leaves(other_gradients), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def test_fsdp_and_tensor_shard_the_parameters_and_the_optimizer():
    trainer = Trainer(
        dataclasses.replace(MODEL, compute_dtype='float32'),
        OptimizerConfig(kind='muon'),
        StepConfig(BATCH, LENGTH),
        total_steps=10,
        mesh=MeshConfig(data=1, fsdp=4, tensor=2),
    )
    state = trainer.fresh_state()
    total = sum(x.nbytes for x in jax.tree.leaves(state))
    one_device = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    # Norm scales, fsdp-sharded only, keep it from being exactly an eighth.
    assert one_device < total / 7


def test_a_microbatch_that_the_mesh_cannot_divide_is_named():
    with pytest.raises(UserError, match=r'4 rows .* cannot be divided over 8 devices'):
        Trainer(MODEL, GRADIENT, StepConfig(BATCH, LENGTH, 4), 10, MeshConfig(data=8))


def test_heads_that_the_tensor_axis_cannot_divide_are_named():
    with pytest.raises(UserError, match=r"'kv_heads' of size 2 cannot be divided over mesh axis 'tensor' of size 4"):
        Trainer(MODEL, GRADIENT, StepConfig(BATCH, LENGTH), 10, MeshConfig(data=1, tensor=4))
