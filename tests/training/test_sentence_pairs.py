"""The loss of pairs of texts: BERT's own, and the same on a mesh, in microbatches and in evaluation."""

import functools

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from llm.parallel.mesh import MeshConfig
from llm.training.loop import Evaluation, evaluate
from llm.training.sentence_pairs import with_pair_weights
from llm.training.step import StepConfig, _summed_loss
from llm.training.trainer import Trainer
from tests.compiling import QUICKLY
from tests.interop.huggingface.encoder_models import V, make
from tests.interop.huggingface.test_encoder_families import imported
from tests.models.small_encoders import bert
from tests.training.parity_cases import GRADIENT

ROWS, S, M = 8, 16, 8


def batch(vocabulary=V):
    """Rows of pairs, one of them without a label, one of padding alone."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, vocabulary, (ROWS, S)).astype(np.int32)
    real = np.array([16, 12, 9, 16, 14, 7, 16, 0])
    inside = np.arange(S) < real[:, None]
    index = np.sort(np.argsort(rng.random((ROWS, S)), axis=1)[:, :M], axis=1).astype(np.int32)
    labels = np.array([0, 1, 1, 0, 1, -1, 0, -1])
    return {
        'inputs': np.where(inside, tokens, 0).astype(np.int32),
        'segment_ids': inside.astype(np.int32),
        'positions': np.tile(np.arange(S, dtype=np.int32), (ROWS, 1)),
        'token_types': (inside & (np.arange(S) >= real[:, None] // 2)).astype(np.int32),
        'predicted': index,
        'targets': rng.integers(1, vocabulary, (ROWS, M)).astype(np.int32),
        'loss_weights': (np.take_along_axis(inside, index, 1) & (rng.random((ROWS, M)) < 0.6)).astype(np.float32),
        'next_sentence': np.repeat(labels[:, None], S, axis=1).astype(np.int32),
    }


@pytest.mark.oracle
def test_logits_and_loss_are_those_of_transformers():
    theirs, _ = make('bert for pretraining')
    checkpoint, params = imported('bert for pretraining')
    rows = batch()
    labels = np.full((ROWS, S), -100)
    for row in range(ROWS):
        chosen = rows['loss_weights'][row] > 0
        labels[row, rows['predicted'][row][chosen]] = rows['targets'][row][chosen]
    pairs = rows['next_sentence'][:, 0]
    with torch.no_grad():
        found = theirs(
            torch.tensor(rows['inputs'].astype(np.int64)),
            attention_mask=torch.tensor(rows['segment_ids']),
            token_type_ids=torch.tensor(rows['token_types'].astype(np.int64)),
            labels=torch.tensor(labels),
            next_sentence_label=torch.tensor(np.where(pairs < 0, -100, pairs).astype(np.int64)),
        )
    graph = nnx.split(checkpoint.config.build())[0]
    arrays = ('inputs', 'segment_ids', 'positions', 'token_types', 'predicted')

    @jax.jit
    def ours(params):
        module = nnx.merge(graph, params)
        hidden, logits, _ = module.hidden_and_pair_logits(**{name: rows[name] for name in arrays})
        weighted = with_pair_weights({name: jax.numpy.asarray(x) for name, x in rows.items()})
        loss, sums = _summed_loss(graph, params, weighted, None, 0.0)
        return module.projection()(hidden), logits, loss / sums['tokens']

    logits, pair_logits, loss = ours(params)
    real = pairs >= 0
    expected = np.take_along_axis(found.prediction_logits.numpy(), rows['predicted'][..., None], 1)
    with_loss = rows['loss_weights'] > 0
    np.testing.assert_allclose(logits[with_loss], expected[with_loss], atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(pair_logits[real], found.seq_relationship_logits.numpy()[real], atol=1e-4)
    assert float(loss) == pytest.approx(float(found.loss), rel=1e-4)


@functools.cache
def run(mesh, accumulation):
    """(metrics, gradients, evaluation) in float64."""
    config = bert(2, pooler=True, next_sentence=True, vocab=64, compute_dtype='float64')
    rng = np.random.default_rng(1)
    with jax.enable_x64():
        devices = jax.devices()[: int(np.prod(mesh.sizes(8)))]
        trainer = Trainer(config, GRADIENT, StepConfig(ROWS, S, accumulation), 10, mesh, devices=devices)
        started = jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape), trainer.abstract_state['parameters'])
        state = {
            'parameters': started,
            'optimizer': trainer.abstract_state['optimizer'],
            'step': np.zeros((), np.int32),
        }
        state['optimizer'] = trainer.optimizer.init(started)
        state = jax.device_put(state, trainer.state_shardings)
        rows = jax.device_put(batch(64), trainer.batch_sharding)

        class One:
            def batch(self, step):
                return rows

        values = evaluate(trainer, state['parameters'], Evaluation(One(), 1))
        new, metrics = trainer.train_step.lower(state, rows).compile(QUICKLY)(state, rows)
        gradients = jax.tree.map(lambda a, b: a - np.asarray(b), started, jax.device_get(new['parameters']))
        return jax.device_get(metrics), gradients, values


def test_a_mesh_with_stages_agrees_with_one_device():
    metrics, gradients, values = run(MeshConfig(data=1), 2)
    parallel = run(MeshConfig(data=1, fsdp=2, sequence=2, pipeline=2), 2)
    for name in ('loss', 'next_sentence_loss', 'next_sentence_accuracy'):
        assert float(parallel[0][name]) == pytest.approx(float(metrics[name]), rel=1e-6)
        for evaluated in (values, parallel[2]):
            assert evaluated[name] == pytest.approx(float(metrics[name]), rel=1e-6)
    assert float(metrics['next_sentence_accuracy']) * 6 == pytest.approx(round(metrics['next_sentence_accuracy'] * 6))
    for (path, exact), actual in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(parallel[1]), strict=True):
        size = 1e-3 if 'key_bias' in jax.tree_util.keystr(path) else np.abs(exact).max()
        assert size > 0, path
        np.testing.assert_allclose(actual, exact, rtol=0, atol=1e-9 * size, err_msg=jax.tree_util.keystr(path))
