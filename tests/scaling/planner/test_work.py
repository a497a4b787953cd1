import dataclasses

import pytest

from llm.models.attention import AttentionConfig
from llm.models.decoder import DecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.layer import LayerConfig
from llm.models.moe import MoeConfig
from llm.models.recurrent_attention import RecurrentAttentionConfig
from llm.scaling.accounting import flops_per_token
from llm.scaling.planner.abstract import model_specs
from llm.scaling.planner.work import step_flops, step_traffic
from llm.training.step import StepConfig
from tests.models.small_encoders import bert, t5
from tests.scaling.planner.small_runs import LENGTH, ROWS, D, F, H, K, L, V, sizes_of, small_run

TOKENS = ROWS * LENGTH
LAYER_MATRICES = 4 * D * H * K + 3 * D * F
WEIGHTS = 2 * (L * LAYER_MATRICES + V * D)  # bytes in bf16 of what is gathered: no embedding, and norms apart


def flops(**changes):
    run = small_run(**changes)
    return step_flops(run, sizes_of(run), 'tpu')


def changed(model, *stacks, **layer):
    """The model with other parts in the layers of these stacks."""
    patterns = {
        name: tuple(dataclasses.replace(each, **layer) for each in getattr(model, name).pattern) for name in stacks
    }
    new = {name: dataclasses.replace(getattr(model, name), pattern=patterns[name]) for name in stacks}
    return dataclasses.replace(model, **new)


def of_other_models():
    """Encoders of pairs and with experts, two sides of different lengths, and rows that go on from others."""
    held = AttentionConfig(4, 4, 8, causal=False, implementation='reference')
    experts = MoeConfig(num_experts=4, experts_per_token=2, expert=FeedForwardConfig(48), shared=FeedForwardConfig(16))
    writing = changed(t5(), 'decoder', mixer=dataclasses.replace(held, causal=True), cross=held)
    remembering = LayerConfig(RecurrentAttentionConfig(4, 4, 8, memory_length=16), FeedForwardConfig(48))
    for model in (
        bert(mixer=held, pooler=True, next_sentence=True, embedding_size=16),
        changed(bert(), 'layers', mixer=held, feed_forward=experts),
        changed(writing, 'encoder', mixer=held),
        DecoderConfig(V, D, L, (remembering,), position='none'),
    ):
        yield dataclasses.replace(small_run(), model=model, step=StepConfig(8, 40))


@pytest.mark.parametrize('run', [small_run(), *of_other_models()])
def test_hardware_does_the_models_work_where_nothing_is_computed_again(run):
    """Attention that holds all scores does all of attention: PaLM's convention."""
    per_token = flops_per_token(run.model, model_specs(run.model), run.row)
    expected = run.tokens_per_step * per_token.training(causal=False)
    found = step_flops(run, sizes_of(run), 'tpu')
    assert found.hardware == pytest.approx(expected) == pytest.approx(found.model)
    assert found.recomputed == 0


@pytest.mark.parametrize('mesh', [{'data': 4}, {'fsdp': 8}, {'tensor': 4}, {'fsdp': 2, 'tensor': 2}, {'sequence': 2}])
def test_devices_share_the_work(mesh):
    devices = 1
    for size in mesh.values():
        devices *= size
    assert flops(mesh=mesh, remat='full').hardware * devices == pytest.approx(flops(remat='full').hardware)


def test_full_remat_computes_the_layers_again_but_for_their_last_product():
    attention = 2 * 2 * H * K * LENGTH
    assert flops(remat='full').recomputed == TOKENS * L * (2 * (LAYER_MATRICES - D * F) + attention)


def test_remat_of_dots_computes_no_product_again():
    assert flops(remat='dots').recomputed == 0


def test_remat_without_batch_dimensions_computes_attention_again():
    assert flops(remat='dots_no_batch').recomputed == TOKENS * L * 2 * 2 * H * K * LENGTH


def test_kernel_skips_masked_blocks_and_computes_scores_again():
    held, kernel = flops(remat='none').hardware, flops(remat='none', implementation='pallas_tpu').hardware
    attention = TOKENS * L * 2 * 2 * H * K  # for each key
    assert held - kernel == pytest.approx(attention * (3 * LENGTH - 3.5 * (LENGTH + 1) / 2))
    twice = flops(remat='none', implementation='pallas_gpu').hardware
    assert twice - kernel == pytest.approx(attention * (LENGTH + 1) / 2)


def test_kept_outputs_of_a_kernel_spare_its_forward_pass():
    kept = flops(remat='names', remat_names=('query', 'key', 'value', 'attention'), implementation='pallas_tpu')
    # Left: the output projection, up and gate.
    assert kept.recomputed == TOKENS * L * 2 * (D * H * K + 2 * D * F)


def test_model_flops_do_not_depend_on_the_layout():
    assert flops(mesh={'tensor': 4}, remat='full').model == flops(remat='none').model


def traffic(**changes):
    run = small_run(**changes)
    return {(row.kind, row.axes): row for row in step_traffic(run, sizes_of(run), 'tpu')}


def test_one_device_sends_nothing():
    assert traffic() == {}


def test_sharded_weights_are_gathered_twice_and_their_gradients_scattered():
    found = traffic(mesh={'fsdp': 4}, step={'gradient_accumulation': 2})
    gather, scatter = found['all-gather', ('fsdp',)], found['reduce-scatter', ('fsdp',)]
    norms = 2 * (2 * L + 1) * D
    assert gather.payload == 2 * 2 * (WEIGHTS + norms) and gather.link_bytes == 3 / 4 * gather.payload
    assert scatter.payload == 2 * (WEIGHTS + norms)


def test_replicated_weights_have_their_gradients_summed():
    found = traffic(mesh={'data': 4})
    # Everything that has a gradient: the embedding and the norms too.
    parameters = L * LAYER_MATRICES + 2 * V * D + (2 * L + 1) * D
    assert found['all-reduce', ('data',)].payload == 2 * parameters
    assert set(found) == {('all-reduce', ('data',))}


def test_split_products_sum_activations():
    found = traffic(mesh={'tensor': 4}, remat='none')
    # Two sums a layer in each direction, and the embedding's and the head's; each gathered again.
    assert found['reduce-scatter', ('tensor',)].payload == (4 * L + 2) * TOKENS * D * 2
    assert found['all-gather', ('tensor',)].payload == (4 * L + 2) * TOKENS * D * 2


def test_split_products_with_a_whole_residual_stream_sum_it():
    run = small_run(mesh={'tensor': 4}, remat='none')
    activations = tuple(row for row in run.rules.activations if row[0] != 'residual')
    rules = dataclasses.replace(run.rules, activations=(*activations, ('residual', 'sequence')))
    (row,) = step_traffic(dataclasses.replace(run, rules=rules), sizes_of(run), 'tpu')
    assert (row.kind, row.axes, row.payload) == ('all-reduce', ('tensor',), (4 * L + 2) * TOKENS * D * 2)


@pytest.mark.parametrize(
    ('method', 'kind', 'payload'),
    [
        # Keys and values go round once forward; then they do again, and their gradients with them.
        ('ring', 'collective-permute', 3 * 1 / 2 * 2 * H * K),
        ('ulysses', 'all-to-all', 2 * 1 / 2 * 4 * H * K),
        ('all_gather', 'all-gather', 2 * 2 * H * K),
    ],
)
def test_split_sequences(method, kind, payload):
    run = small_run(mesh={'sequence': 2}, remat='none')
    rules = dataclasses.replace(
        run.rules,
        parameters=tuple(row for row in run.rules.parameters if row[0] != 'embed'),
        sequence_method=method,
    )
    rows = step_traffic(dataclasses.replace(run, rules=rules), sizes_of(run), 'tpu')
    found = {(row.kind, row.axes): row for row in rows}
    assert found[kind, ('sequence',)].payload == L * TOKENS * payload * 2
