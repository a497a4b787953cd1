"""What the batches of a run hold, by its model and objective, and the search for layouts of any model."""

import dataclasses

import numpy as np
import pytest

from llm.data.objectives.denoising import UL2_DENOISERS, SpanCorruption
from llm.data.objectives.masking import MaskedLanguageModelling
from llm.data.objectives.prefix import PrefixLanguageModelling
from llm.data.objectives.sentence_pairs import SentencePairs
from llm.data.vocabularies.byte_vocabulary import ByteVocabulary
from llm.errors import UserError
from llm.parallel.mesh import MeshConfig
from llm.scaling.accounting import bytes_per_device
from llm.scaling.planner.compiling import abstract_batch
from llm.scaling.planner.planning import estimate
from llm.scaling.planner.run_config import RunConfig
from llm.scaling.planner.stacks import remat_of, with_remat
from llm.scaling.planner.topology import find_topology
from llm.training.optimizers import OptimizerConfig
from llm.training.step import StepConfig
from tests.models.small_encoders import bert, t5
from tests.models.test_transformer_xl import CONFIG as TRANSFORMER_XL
from tests.scaling.planner.small_runs import small_run

LENGTH = 40
REMEMBERING = dataclasses.replace(TRANSFORMER_XL, vocab_size=64)
PAIRS = {'pooler': True, 'next_sentence': True}


def run_of(model, objective=None, **mesh):
    mesh = MeshConfig(**{'data': 1, **mesh})
    return RunConfig(model, OptimizerConfig(), StepConfig(8, LENGTH), mesh, objective=objective)


@pytest.mark.parametrize(
    ('model', 'objective', 'made'),
    [
        (bert(), None, MaskedLanguageModelling()),
        (bert(**PAIRS), MaskedLanguageModelling(0.4), MaskedLanguageModelling(0.4)),
        (bert(**PAIRS), None, SentencePairs()),
        (t5(), None, SpanCorruption()),
        (t5(), SpanCorruption(UL2_DENOISERS), SpanCorruption(UL2_DENOISERS)),
        (small_run().model, PrefixLanguageModelling(), PrefixLanguageModelling()),
    ],
)
def test_rows_are_what_the_objective_makes_of_text(model, objective, made):
    """Of one row of tokens, and of the same again where a row needs another."""
    row = {name: np.ones(LENGTH, np.int32) for name in ('inputs', 'targets', 'segment_ids')}
    row |= {'positions': np.arange(LENGTH, dtype=np.int32), 'loss_weights': np.ones(LENGTH, np.float32)}
    row['segment_ids'][30:] = 0
    row |= {f'other_{name}': array for name, array in row.items()}
    arrays = made.bind(ByteVocabulary(), LENGTH)(row, np.random.default_rng(0))
    arrays = {name: array for name, array in arrays.items() if not name.startswith('other_')}
    assert run_of(model, objective).row_arrays == {name: len(array) for name, array in arrays.items()}
    assert all(array.dtype.itemsize == 4 for array in arrays.values())


@pytest.mark.parametrize('model', [bert(vocab=64, **PAIRS), t5(vocab_size=64), REMEMBERING])
def test_arguments_are_those_of_the_trainer(model):
    """Train state, with what Transformer-XL remembers, and batch."""
    run = run_of(model, fsdp=4, tensor=2)
    trainer = run.trainer(find_topology('cpu:8'))
    found = bytes_per_device(trainer.abstract_state) + bytes_per_device(abstract_batch(trainer, run))
    plan = estimate(run, find_topology('cpu:8'))
    assert plan.estimate.arguments == found - 4  # the count of steps
    assert (plan.estimate.remembered > 0) == ('memory' in trainer.abstract_state)


def test_an_objective_of_other_models_is_refused():
    with pytest.raises(UserError, match='SpanCorruption is no objective of an EncoderConfig'):
        run_of(bert(), SpanCorruption()).row  # noqa: B018


def test_both_stacks_compute_again():
    model = with_remat(t5(), 'full')
    assert remat_of(model) == (('full', ()),) * 2
    mixed = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, remat='dots'))
    assert run_of(mixed).describe().endswith('remat full and dots')
