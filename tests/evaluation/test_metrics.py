"""Metrics against figures that seqeval 1.2.2 (`conlleval` mode) and the papers' definitions give."""

import math

import numpy as np
import pytest

from llm.errors import UserError
from llm.evaluation import metrics
from llm.evaluation.metrics import classification, generation, regression, span_f1, spans


@pytest.mark.parametrize(
    ('tags', 'expected'),
    [
        ('B-A I-A O B-A', {('A', 0, 1), ('A', 3, 3)}),
        ('I-A I-A I-B O I-B', {('A', 0, 1), ('B', 2, 2), ('B', 4, 4)}),
        ('B-A B-A I-A', {('A', 0, 0), ('A', 1, 2)}),
        ('S-A B-A I-A E-A E-A O', {('A', 0, 0), ('A', 1, 3), ('A', 4, 4)}),
        ('B-A E-B I-B', {('A', 0, 0), ('B', 1, 1), ('B', 2, 2)}),
        ('O O', set()),
    ],
)
def test_spans(tags, expected):
    assert spans(tags.split()) == expected


# Random tags, and the same with some replaced.
REFERENCES = [
    'I-B B-B B-B I-B O I-A',
    'B-A O B-A O B-B I-A',
    'B-A I-A I-B O I-B B-A',
    'O B-A I-A B-B B-A I-A',
    'B-A O B-A I-B I-B I-A',
    'B-A B-A O O B-A B-A',
]
PREDICTIONS = [
    'I-B B-B O I-B O I-A',
    'I-A O B-A B-A B-B I-A',
    'I-A I-A I-B O O B-A',
    'B-B O I-A B-A B-A I-A',
    'B-B O O I-B I-B I-A',
    'B-A B-A O B-A O I-B',
]


def test_span_f1_equals_seqeval():
    found = span_f1([row.split() for row in PREDICTIONS], [row.split() for row in REFERENCES])
    assert found == pytest.approx(
        {
            'span_precision': 0.6521739130434783,
            'span_recall': 0.6521739130434783,
            'span_f1': 0.6521739130434783,
            'accuracy': 0.6388888888888888,
        },
        rel=1e-12,
    )


def test_classification_of_uneven_classes():
    # Class 2 is never predicted: F1 0. Class 0: 2 of 3 right, all found: 0.8. Class 1: 1 of 1, 1 of 1: 1.
    found = classification([0, 0, 0, 1], [0, 0, 2, 1])
    assert found == pytest.approx({'accuracy': 0.75, 'macro_f1': 0.6, 'micro_f1': 0.75})


def test_regression_of_ranks_and_values():
    found = regression([1.0, 2.0, 3.0, 10.0], [1.0, 2.0, 3.0, 4.0])
    assert found['mean_squared_error'] == 9.0
    assert found['spearman'] == pytest.approx(1.0)
    # Deviations (-3, -2, -1, 6) and (-1.5, -0.5, 0.5, 1.5): products 14, norms sqrt(50) and sqrt(5).
    assert found['pearson'] == pytest.approx(14 / math.sqrt(250))
    assert regression([2.0, 2.0], [1.0, 3.0])['pearson'] == 0.0


def test_generation():
    exact = generation(['the cat sat on the mat .'], ['the cat sat on the mat .'])
    assert exact == pytest.approx({'exact_match': 1, 'bleu': 100, 'rouge1': 1, 'rouge2': 1, 'rougeL': 1})
    found = generation(['the cat sat on a mat today'], ['the cat sat on the mat'])
    # n-grams that match: 5/7, 3/6, 2/5, 1/4; seven words are not too short.
    assert found['bleu'] == pytest.approx(100 * (5 / 7 * 3 / 6 * 2 / 5 * 1 / 4) ** 0.25)
    assert found['rouge1'] == pytest.approx(2 * 5 / 13)
    assert found['rouge2'] == pytest.approx(2 * 3 / 11)
    assert found['exact_match'] == 0.0


def test_lengths_must_agree():
    with pytest.raises(ValueError, match='2 predictions for 1 references'):
        classification([0, 1], [0])
    with pytest.raises(ValueError, match='1 tags for a sentence of 2'):
        span_f1([['O']], [['O', 'O']])


def test_a_missing_library_is_named():
    with pytest.raises(UserError, match=r'no_such_library is not installed.*\[eval\]'):
        metrics.library('no_such_library')


def test_similarity_is_the_correlation_of_cosines():
    from scipy import stats
    from scipy.spatial.distance import cosine

    generator = np.random.default_rng(0)
    a, b, scores = generator.normal(size=(9, 4)), generator.normal(size=(9, 4)), generator.integers(0, 5, 9).tolist()
    cosines = [1 - cosine(*pair) for pair in zip(a, b, strict=True)]
    np.testing.assert_allclose(metrics.cosines(a, b), cosines)
    found = metrics.similarity(a, b, scores)
    assert found['pearson'] == pytest.approx(stats.pearsonr(cosines, scores).statistic)
    assert found['spearman'] == pytest.approx(stats.spearmanr(cosines, scores).statistic)


def test_retrieval():
    documents = np.eye(12)
    queries = np.zeros((4, 12))
    queries[0, 3] = 1  # found first
    queries[1, [3, 4]] = 2, 1  # second
    queries[2, :7] = range(7, 0, -1)  # the sixth is looked for
    ranks = metrics.ranks_of(queries, documents, [3, 4, 5, 0])
    # What says the same of everything has found nothing.
    np.testing.assert_array_equal(ranks, [1, 2, 6, 12])
    assert metrics.retrieval(ranks) == {
        'recall_at_1': 0.25,
        'recall_at_5': 0.5,
        'recall_at_10': 0.75,
        'mrr': pytest.approx((1 + 1 / 2 + 1 / 6 + 1 / 12) / 4),
    }
