"""The convert job to programs of other runtimes, and of models that were adapted."""

import json

import jax
import numpy as np
import pytest

from llm.configuration import Invocation
from llm.data.vocabularies import load_vocabulary
from llm.errors import UserError
from llm.interop.exporting.stablehlo import load_programs
from llm.jobs.convert import Convert
from llm.jobs.trained_model import open_trained_model
from llm.models.low_rank import LowRankConfig
from llm.parallel.mesh import make_mesh
from llm.parallel.sharding import AxisRules
from tests.interop.huggingface import models
from tests.jobs.test_generate import ONE_DEVICE, write_run
from tests.models.small_decoders import run as logits_of

RUN = Invocation(dry_run=False, operative_config='', command=(), config_files=())
TOKENS = np.arange(20, dtype=np.int32).reshape(2, 10)


@pytest.fixture(scope='module')
def adapted(tmp_path_factory):
    """(directory, logits) of a run whose model has adapters that do something."""
    directory = write_run(
        tmp_path_factory.mktemp('runs') / 'adapted',
        steps=(10,),
        low_rank=LowRankConfig(rank=2, train_rest=True),
        change=lambda path, x: x + 0.3 * jax.random.normal(jax.random.key(0), x.shape) if path.endswith('up') else x,
    )
    model = open_trained_model(directory)
    parameters = model.restore(make_mesh(ONE_DEVICE), AxisRules()).state
    return directory, np.asarray(logits_of(model.config, parameters, TOKENS))


@pytest.mark.oracle
def test_adapters_are_merged_for_transformers(adapted, tmp_path):
    import torch

    directory, expected = adapted
    Convert(str(directory), str(tmp_path / 'out'), to='hugging_face')(RUN)
    with torch.no_grad():
        found = models.load(tmp_path / 'out')(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_run_becomes_programs_with_its_vocabulary(adapted, tmp_path):
    directory, expected = adapted
    target = tmp_path / 'programs'
    Convert(str(directory), str(target), to='jax_export', platforms=('cpu',))(RUN)
    found = load_programs(target)['logits']({'tokens': TOKENS})['logits']
    np.testing.assert_allclose(found, expected, atol=1e-4)
    vocabulary = load_vocabulary(target)
    assert vocabulary.encode('hare') == open_trained_model(directory).vocabulary.encode('hare')
    assert json.loads((target / 'manifest.json').read_text())['sequence_length'] == 64
    with pytest.raises(UserError, match='is there already and not empty'):
        Convert(str(directory), str(target), to='jax_export')(RUN)
    with pytest.raises(UserError, match='platforms are'):
        Convert(str(directory), str(tmp_path / 'new'), to='jax_export', platforms=('abacus',))(RUN)
    assert [path.name for path in tmp_path.iterdir()] == ['programs']
