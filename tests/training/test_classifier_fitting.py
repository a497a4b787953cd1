"""What JAX is given of example files: the batches are padded, and score as the saved model does."""

import dataclasses
import json
import random

import numpy as np

from llm.data.documents.classification.examples import TRAINING, VALIDATION, Examples, read_examples
from llm.data.documents.classification.features import NgramFeatures
from llm.data.documents.sources.records import JsonLines
from llm.data.documents.stage import Chain
from llm.jobs.telling_ngrams import telling_ngrams
from llm.training.classifier_fitting import example_batch, train
from llm.training.linear_classifier import LinearTraining, logits

LABELS = ('a', 'b', 'c')


def test_a_padded_batch_with_features_that_were_not_trained_on_scores_as_the_model(tmp_path):
    drawn = random.Random(0)
    rows = []
    for i in range(120):
        words = [f'word{drawn.randrange(40)}' for _ in range(drawn.randrange(1, 12))]
        rows.append({'text': f'only{i} {" ".join(words)}', 'label': drawn.choice(LABELS)})
    (tmp_path / 'rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    source = JsonLines(name='rows', files=str(tmp_path / 'rows.jsonl'))
    features = NgramFeatures(buckets=1 << 12)
    files = read_examples(
        [Examples(source, label_field='label')],
        Chain(()),
        features,
        LABELS,
        tmp_path / 'examples',
        exclusive=True,
        held_out=0.0,
        validation=0.3,
        seed=0,
    )
    config = LinearTraining(epochs=2, batch_size=32)
    model, history, used = train(files, features, config, LABELS, exclusive=True)
    assert len(history) == 2 and model.weights.shape == (1 << 12, 3)
    validation = np.flatnonzero(files.split == VALIDATION)
    sparse = files.batch(validation)
    assert (used.number[sparse.indices] < 0).any() and 20 < len(validation) < 60
    weights = np.arange(len(files), dtype=np.float32)[:, None]
    batch = example_batch(files, used, files.targets, weights, validation, len(validation) + 3)
    assert batch.indices.shape == batch.values.shape == batch.rows.shape == (4096,)
    np.testing.assert_array_equal(batch.weights[:, 0], [*validation, 0, 0, 0])
    np.testing.assert_array_equal(batch.targets[:-3], files.targets[validation])
    found = logits((model.weights[used.number >= 0], model.bias), batch)
    np.testing.assert_allclose(found[:-3], model.logits(sparse), rtol=1e-4, atol=1e-5)

    learnt = files.batch(np.flatnonzero(files.split == TRAINING))
    dense = np.zeros((len(learnt), 1 << 12))
    dense[learnt.rows, learnt.indices] = learnt.values
    np.testing.assert_array_equal(used.examples, (dense > 0).sum(0))
    np.testing.assert_allclose(used.deviation, dense.std(0), atol=1e-7)
    said = telling_ngrams(model, files, used)
    assert all(row['ngram'] and row['examples'] for sides in said.values() for side in sides.values() for row in side)
    nothing = dataclasses.replace(model, weights=np.zeros_like(model.weights))  # as of classes of the same texts
    assert telling_ngrams(nothing, files, used) == {label: {'for': [], 'against': []} for label in LABELS}
