"""The n-grams that decide most of what a linear classifier says; weights are of buckets, names come from examples."""

from collections import Counter, defaultdict
from typing import Any

import numpy as np

from llm.data.documents.classification.examples import TRAINING, ExampleFiles
from llm.data.documents.classification.model import LinearClassifier
from llm.training.classifier_fitting import UsedBuckets, chunks

# For each label, in each direction.
_LISTED = 40
# Examples in which the name of a bucket is looked for.
_LOOKED_AT = 8


def telling_ngrams(model: LinearClassifier, files: ExampleFiles, used: UsedBuckets) -> dict[str, dict[str, Any]]:
    """For each label (of two exclusive ones the first) the n-grams for and against it, the most telling first.

    They are ranked by the weight times the standard deviation of the feature in training (the standardised
    coefficient): neither what is in every text counts, nor what is in one.
    """
    training = np.flatnonzero(files.split == TRAINING)
    columns = []
    for i in range(model.weights.shape[1]):
        effect = model.weights[:, i] * used.deviation
        order = np.argsort(-np.abs(effect), kind='stable')
        columns.append({'for': _first(order, effect > 0), 'against': _first(order, effect < 0)})
    wanted = {bucket for column in columns for some in column.values() for bucket in some}
    names = _names(model, files, training, wanted)
    return {
        label: {
            side: [
                {
                    'ngram': names.get(bucket, ''),
                    'weight': float(model.weights[bucket, i]),
                    'examples': int(used.examples[bucket]),
                }
                for bucket in some
            ]
            for side, some in column.items()
        }
        for i, (label, column) in enumerate(zip(model.labels, columns, strict=False))
    }


def _first(order: np.ndarray, which: np.ndarray) -> list[int]:
    chosen: list[int] = order[which[order]][:_LISTED].tolist()
    return chosen


def _names(model: LinearClassifier, files: ExampleFiles, training: np.ndarray, wanted: set[int]) -> dict[int, str]:
    """Of each bucket the most frequent n-gram in excerpts, and the next one where hashes collide."""
    asked = np.array(sorted(wanted), np.int64)
    found: dict[int, Counter[str]] = defaultdict(Counter)
    examples = Counter[int]()
    for chunk in chunks(training):
        sparse = files.batch(chunk)
        hits = np.flatnonzero(np.isin(sparse.indices, asked))
        rows = np.searchsorted(sparse.offsets, hits, side='right') - 1
        useful = set()
        for row, bucket in zip(rows.tolist(), sparse.indices[hits].tolist(), strict=True):
            if examples[bucket] < _LOOKED_AT:
                examples[bucket] += 1
                useful.add(row)
        for row in sorted(useful):
            for ngram, bucket in model.features.strings(files.excerpt(int(chunk[row]))):
                if bucket in wanted:
                    found[bucket][ngram] += 1
        if all(examples[bucket] >= _LOOKED_AT for bucket in wanted):
            break
    return {bucket: ' | '.join(name for name, _ in counts.most_common(2)) for bucket, counts in found.items()}
