import pytest

from llm.errors import UserError
from llm.models.multi_token import MultiTokenConfig
from llm.scaling.planner.abstract import tiled_bytes
from llm.scaling.planner.memory import LAYER_AT_ONCE, OFFLOADED_LAYERS, WHOLE_MATRICES, estimate_memory
from tests.scaling.planner.small_runs import LENGTH, ROWS, D, F, H, K, L, V, sizes_of, small_run

PARAMETERS = L * (4 * D * H * K + 3 * D * F + 2 * D) + D + 2 * V * D


def memory(platform='gpu', **changes):
    run = small_run(**changes)
    return estimate_memory(run, sizes_of(run), platform)


def test_state_of_one_device():
    found = memory()
    assert found.parameters == 4 * PARAMETERS
    assert found.optimizer == 8 * PARAMETERS + 2 * 4  # two counts of steps
    assert found.gradients == 4 * PARAMETERS
    assert found.batch == 5 * 4 * ROWS * LENGTH


def test_state_is_shared_by_fsdp_and_not_by_data():
    assert memory(mesh={'data': 4}).parameters == memory().parameters
    assert memory(mesh={'fsdp': 4}).parameters == memory().parameters / 4


def test_full_remat_keeps_the_input_of_every_layer():
    assert memory(remat='full').activations == L * ROWS * LENGTH * D * 2
    assert memory(remat='full', mesh={'data': 4}).activations == L * ROWS * LENGTH * D * 2 / 4


def test_names_keep_what_they_name():
    kept = memory(remat='names', remat_names=('query', 'attention')).activations
    assert kept == L * ROWS * LENGTH * 2 * (D + 2 * H * K)


def test_what_is_offloaded_waits_on_the_host():
    inputs = memory(remat='offload', remat_names=('layer_input',))
    one = ROWS * LENGTH * D * 2
    assert inputs.host == L * one
    assert inputs.activations == OFFLOADED_LAYERS * one  # on their way
    queries = memory(remat='offload', remat_names=('query',))
    assert queries.host == L * ROWS * LENGTH * H * K * 2
    assert queries.activations == L * one + OFFLOADED_LAYERS * ROWS * LENGTH * H * K * 2
    assert memory(remat='full').host == 0


def test_the_host_of_a_cpu_is_the_device_itself():
    assert memory('cpu', remat='offload', remat_names=('layer_input',)) == memory('cpu', remat='full')


def test_policies_keep_less_and_less():
    kept = [memory(remat=remat).activations for remat in ('none', 'dots', 'dots_no_batch', 'full')]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4


def test_scores_are_held_by_the_reference_alone():
    long = {'batch_size': 1, 'sequence_length': 4096}
    held, blocks = (memory(remat='none', step=long, implementation=each) for each in ('reference', 'pallas_tpu'))
    assert held.activations - blocks.activations == L * 4096 * H * (4096 - 1) * (4 + 2)
    # Worked on at once are the weights alone.
    assert held.layer - blocks.layer == pytest.approx(LAYER_AT_ONCE * 4096 * H * (4096 * 2 - (4 + 2)))


@pytest.mark.parametrize(('kind', 'arrays'), [('parallel', 1), ('sequential', 2)])
def test_multi_token_prediction_adds_layers_states_and_parameters(kind, arrays):
    plain, found = memory(remat='full'), memory(remat='full', multi_token=MultiTokenConfig(2, kind))
    # Of each depth the layer's input, its state for the loss, and in sequence the embedding of a token.
    assert found.activations - plain.activations == 2 * (1 + arrays) * ROWS * LENGTH * D * 2
    layer = 4 * D * H * K + 3 * D * F + 2 * D
    module = layer + 2 * D * D + 3 * D if kind == 'sequential' else layer
    assert found.parameters - plain.parameters == 4 * 2 * module


def test_accumulation_halves_activations_and_adds_a_sum_of_gradients():
    one, two = memory(remat='full'), memory(remat='full', step={'gradient_accumulation': 2})
    assert two.activations == one.activations / 2
    assert two.gradients == 2 * one.gradients


def test_muon_works_on_whole_matrices_after_the_backward_pass():
    step = {'batch_size': 4, 'sequence_length': 8}  # so few tokens that the update needs most
    found = memory(mesh={'fsdp': 4}, step=step, optimizer='muon')
    assert found.temporaries == found.gradients + WHOLE_MATRICES * 4 * L * D * F


@pytest.mark.parametrize(
    ('shape', 'elements'),
    [
        ((), 1),
        ((128,), 128),
        ((100,), 128),
        ((16, 256), 16 * 256),
        ((3, 64), 4 * 128),
        ((5, 9, 64), 9 * 8 * 128),
        ((768, 64), 768 * 64),
    ],
)
def test_tiles_of_a_tpu(shape, elements):
    assert tiled_bytes(shape, 4) == 4 * elements


def test_short_heads_are_padded_on_a_tpu():
    """K = 64 is half of a tile; with D over four devices no dimension of a projection fills one."""
    whole, quarter = {}, {'fsdp': 4}
    norms = 4 * 2 * D  # two of [3, D] each take the place of [4, D]
    assert memory('tpu', mesh=whole).parameters - memory('gpu', mesh=whole).parameters == norms
    # Of [3, 64] that of [4, 128], and the last one, of [64], that of [128].
    norms = 4 * (2 * (4 * 128 - 3 * 64) + 128 - 64)
    padding = memory('tpu', mesh=quarter).parameters - memory('gpu', mesh=quarter).parameters
    assert padding == 4 * L * 4 * D * H * K / 4 + norms


def test_indivisible_model_is_refused():
    with pytest.raises(UserError, match='cannot be divided'):
        memory(mesh={'tensor': 3})
