import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from llm.models.attention import AttentionConfig
from llm.models.decoder import Decoder, DecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.layer import LayerConfig
from llm.models.parameters import parameter_specs
from llm.parallel.mesh import MeshConfig
from llm.parallel.sharding import AxisRules
from llm.scaling.program import Collective, Program, read_program, weight_traffic
from llm.scaling.program.hlo_text import Shape
from llm.training.optimizers import OptimizerConfig
from llm.training.step import StepConfig
from llm.training.trainer import Trainer
from tests.scaling.abstract_meshes import mesh_of

V, D, H, K, F, L = 512, 256, 2, 128, 768, 3
LAYER = LayerConfig(
    mixer=AttentionConfig(num_heads=H, num_kv_heads=H, head_dim=K, implementation='reference'),
    feed_forward=FeedForwardConfig(d_ff=F),
)
DECODER = DecoderConfig(vocab_size=V, d_model=D, num_layers=L, pattern=(LAYER,), compute_dtype='bfloat16', remat='full')
MATRICES = L * (4 * D * H * K + 3 * D * F)  # of the layers
NORMS = (2 * L + 1) * D
SHARDED = MATRICES + NORMS + V * D  # and the head; the embedding is looked up where it is


def traffic(mesh, *collectives, decoder=DECODER, microbatches=1):
    specs = parameter_specs(Decoder(decoder))
    program = Program(tuple(collectives), ())
    return weight_traffic(program, specs, mesh, AxisRules(), compute_dtype='bfloat16', microbatches=microbatches)


def collective(kind, dimensions, axes=('fsdp',), count=1, element_type='bf16'):
    return Collective(kind, 'x', '', (Shape(element_type, dimensions),), 4, axes, False, False, count)


def test_least_is_two_gathers_and_a_scatter_of_every_sharded_weight():
    found = traffic(mesh_of(fsdp=4))
    assert found.least_gathered == 2 * 2 * SHARDED
    assert found.least_scattered == 2 * SHARDED


def test_least_with_tensor_parallelism_is_of_each_devices_share():
    assert traffic(mesh_of(fsdp=2, tensor=2)).least_scattered == 2 * ((SHARDED - NORMS) / 2 + NORMS)


def test_embedding_that_is_the_head_is_gathered_as_the_head():
    tied = dataclasses.replace(DECODER, tied_embeddings=True)
    assert traffic(mesh_of(fsdp=4), decoder=tied).least_scattered == 2 * SHARDED


def test_nothing_sharded_and_nothing_moved():
    assert traffic(mesh_of(data=4)).ratio == 1.0


@pytest.mark.parametrize('dimensions', [(1, D, F), (F, D), (D, 1, F), (L, D, F)])
def test_gathered_weight_is_known_by_its_dimensions(dimensions):
    found = traffic(mesh_of(fsdp=4), collective('all-gather', dimensions, count=6), microbatches=2)
    elements = D * F * (L if L in dimensions else 1)
    assert (found.gathered, found.scattered, found.other) == (6 / 2 * 2 * elements, 0, 0)


def test_merged_heads_are_the_same_weight():
    assert traffic(mesh_of(fsdp=4), collective('all-gather', (D, H, K))).gathered == 2 * D * H * K
    assert traffic(mesh_of(fsdp=4), collective('all-gather', (D, H * K))).gathered == 2 * D * H * K


def test_activation_is_not_a_weight():
    found = traffic(mesh_of(fsdp=4), collective('all-gather', (8, 128, D)))
    assert (found.gathered, found.other) == (0, 2 * 8 * 128 * D)


def test_other_axes_are_left_out():
    found = traffic(mesh_of(fsdp=2, tensor=2), collective('all-gather', (D, F), axes=('tensor',)))
    assert (found.gathered, found.other) == (0, 0)


def test_all_reduced_gradient_counts_twice():
    found = traffic(
        mesh_of(fsdp=4), collective('reduce-scatter', (D, F)), collective('all-reduce', (D, F), ('data', 'fsdp'))
    )
    assert found.scattered == 3 * 2 * D * F


def test_three_permutations_of_a_quarter_are_a_gather():
    found = traffic(mesh_of(fsdp=4), collective('collective-permute', (D // 4, F), count=3))
    assert (found.permuted, found.other) == (2 * D * F, 0)
    assert found.ratio == 2 * D * F / (found.least_gathered + found.least_scattered)


@pytest.fixture(scope='module')
def trainer():
    devices = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2').devices
    step = StepConfig(batch_size=16, sequence_length=256, gradient_accumulation=2)
    return Trainer(DECODER, OptimizerConfig(), step, 10, MeshConfig(data=1, fsdp=4), devices=devices)


@pytest.fixture(scope='module')
def fsdp_program(trainer):
    """A training step of two microbatches on four TPU chips that share the parameters."""
    types = {'loss_weights': jnp.float32}
    batch = {
        name: jax.ShapeDtypeStruct((16, 256), types.get(name, jnp.int32), sharding=trainer.batch_sharding)
        for name in ('inputs', 'targets', 'loss_weights', 'segment_ids', 'positions')
    }
    return read_program(trainer.train_step.lower(trainer.abstract_state, batch).compile().as_text(), trainer.mesh)


@pytest.mark.tpu_compile
def test_every_collective_of_an_fsdp_step_is_along_fsdp(fsdp_program):
    assert {each.axes for each in fsdp_program.collectives} == {('fsdp',)}
    assert fsdp_program.unknown_loops == ()


@pytest.mark.tpu_compile
@pytest.mark.parametrize('dimensions', [(D, H, K), (H, K, D), (D, F), (F, D)])
def test_layers_weights_are_gathered_in_every_layer_of_every_microbatch(fsdp_program, dimensions):
    """In bf16, once forward and at least once backward."""
    wanted = sorted(dimensions)
    counts = [
        each.count
        for each in fsdp_program.collectives
        for shape in each.shapes
        if each.kind == 'all-gather' and sorted(d for d in shape.dimensions if d > 1) == wanted
    ]
    assert sum(counts) >= 2 * 2 * L
    assert all(count % 2 == 0 for count in counts)


@pytest.mark.tpu_compile
def test_weight_gathers_run_beside_other_work(fsdp_program):
    gathers = [row for row in fsdp_program.traffic() if row.kind == 'all-gather']
    assert sum(row.asynchronous_link_bytes for row in gathers) > 0.5 * sum(row.link_bytes for row in gathers)


@pytest.mark.tpu_compile
def test_gradients_are_scattered(fsdp_program):
    assert any(each.kind == 'reduce-scatter' and each.count == 2 * L for each in fsdp_program.collectives)


@pytest.mark.tpu_compile
def test_fsdp_step_moves_at_least_two_gathers_and_a_scatter_of_the_layers(trainer, fsdp_program):
    found = weight_traffic(
        fsdp_program, trainer.specs, trainer.mesh, trainer.rules, compute_dtype='bfloat16', microbatches=2
    )
    assert found.gathered >= 2 * 2 * MATRICES
    assert found.scattered >= 2 * SHARDED
    assert 1 <= found.ratio < 1.2
