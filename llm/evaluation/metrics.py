"""What predictions are worth: of classes, spans, numbers, texts and vectors.

Accuracy and F1 are scikit-learn's, BLEU is sacrebleu's, ROUGE is rouge-score's: they come with the extra [eval].
"""

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm.errors import UserError


def library(name: str) -> Any:
    """A module of an optional package; raises UserError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f'{name} is not installed', where='evaluation metrics', fix="pip install 'llm-jax[eval]'"
        ) from error


def _check_lengths(predictions: Sequence[Any] | np.ndarray, references: Sequence[Any]) -> None:
    if len(predictions) != len(references) or not len(references):
        raise ValueError(f'{len(predictions)} predictions for {len(references)} references')


def classification(predictions: Sequence[Any], labels: Sequence[Any]) -> dict[str, float]:
    """Accuracy, and F1 as the mean over classes (macro) and over decisions (micro), each from 0 to 1.

    Classes are those that occur in either; a class without a true positive has an F1 of 0.
    """
    _check_lengths(predictions, labels)
    f1_score = library('sklearn.metrics').f1_score
    return {
        'accuracy': float(np.mean([a == b for a, b in zip(predictions, labels, strict=True)])),
        'macro_f1': float(f1_score(labels, predictions, average='macro', zero_division=0.0)),
        'micro_f1': float(f1_score(labels, predictions, average='micro', zero_division=0.0)),
    }


def regression(predictions: Sequence[float], targets: Sequence[float]) -> dict[str, float]:
    """Mean squared error, Pearson's correlation, and Spearman's (of ranks); a constant has correlation 0."""
    _check_lengths(predictions, targets)
    a, b = np.asarray(predictions, np.float64), np.asarray(targets, np.float64)
    return {'mean_squared_error': float(np.mean(np.square(a - b))), **_correlations(a, b)}


def _correlations(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    ranks = library('scipy.stats').rankdata

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.corrcoef(a, b)[0, 1]) if np.std(a) > 0 and np.std(b) > 0 else 0.0

    return {'pearson': correlation(a, b), 'spearman': correlation(ranks(a), ranks(b))}


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of the angle between each vector of `a` and that of `b`: [n, D], [n, D] -> [n]; 0 for a vector of zeros."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.einsum('BD,BD->B', a, b) / np.maximum(lengths, 1e-12)


def similarity(a: np.ndarray, b: np.ndarray, scores: Sequence[float]) -> dict[str, float]:
    """Pearson's and Spearman's correlation of cosines with how alike people say two texts are (Agirre et al. 2012).

    Args:
        a, b: [n, D] vectors of the first and the second texts. scores: n numbers.
    """
    _check_lengths(a, scores)
    return _correlations(cosines(a, b), np.asarray(scores, np.float64))


def ranks_of(queries: np.ndarray, documents: np.ndarray, relevant: Sequence[int]) -> np.ndarray:
    """Rank of each query's document by dot product, from 1 on; a document that ties with it comes before: [n].

    Args:
        queries: [n, D]. documents: [m, D]. relevant: n indices of documents.
    """
    _check_lengths(queries, relevant)
    found = []
    for begin in range(0, len(queries), 1024):
        scores = queries[begin : begin + 1024] @ documents.T
        own = np.take_along_axis(scores, np.asarray(relevant)[begin : begin + 1024, None], axis=1)
        found.append(np.sum(scores >= own, axis=1))
    return np.concatenate(found)


def retrieval(ranks: np.ndarray) -> dict[str, float]:
    """Of the ranks of what was looked for: how often it is among the first k, and the mean of 1 / rank (MRR)."""
    return {
        **{f'recall_at_{k}': float(np.mean(ranks <= k)) for k in (1, 5, 10)},
        'mrr': float(np.mean(1 / ranks)),
    }


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first, last) of the spans that tags of a sentence mark: IOB1, IOB2 or IOBES ('B-PER', 'I-PER', 'O').

    Read as conlleval does (Tjong Kim Sang and Buchholz 2000): a span begins at B or S, and at any other tag that
    does not go on with a span of its own type; it ends with E or S, or before what does not go on with it.
    """
    found: set[tuple[str, int, int]] = set()
    kind: str | None = None
    first, closed = 0, True
    for index, tag in enumerate([*tags, 'O']):
        prefix, _, name = tag.partition('-')
        outside = prefix == 'O'
        goes_on = not outside and not closed and prefix in ('I', 'E') and name == kind
        if kind is not None and not goes_on:
            found.add((kind, first, index - 1))
            kind = None
        if not outside and not goes_on:
            first, kind = index, name
        closed = outside or prefix in ('E', 'S')
    return found


def span_f1(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 over all spans of all sentences, and the accuracy of tags; see `spans`."""
    _check_lengths(predictions, references)
    right = predicted = real = tags = equal = 0
    for ours, theirs in zip(predictions, references, strict=True):
        if len(ours) != len(theirs):
            raise ValueError(f'{len(ours)} tags for a sentence of {len(theirs)}')
        found, wanted = spans(ours), spans(theirs)
        right, predicted, real = right + len(found & wanted), predicted + len(found), real + len(wanted)
        tags, equal = tags + len(theirs), equal + sum(a == b for a, b in zip(ours, theirs, strict=True))
    precision, recall = right / max(predicted, 1), right / max(real, 1)
    return {
        'span_precision': precision,
        'span_recall': recall,
        'span_f1': 2 * right / max(predicted + real, 1),
        'accuracy': equal / max(tags, 1),
    }


def generation(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Exact match, and ROUGE-1, 2 and L (F1 of stemmed words), from 0 to 1; BLEU of the corpus, from 0 to 100.

    BLEU as in Post 2018 (tokenizer 13a); ROUGE as in Lin 2004.
    """
    _check_lengths(predictions, references)
    bleu = library('sacrebleu').corpus_bleu(list(predictions), [list(references)])
    kinds = ('rouge1', 'rouge2', 'rougeL')
    scorer = library('rouge_score.rouge_scorer').RougeScorer(kinds, use_stemmer=True)
    scores = [scorer.score(b, a) for a, b in zip(predictions, references, strict=True)]
    return {
        'exact_match': float(np.mean([a.strip() == b.strip() for a, b in zip(predictions, references, strict=True)])),
        'bleu': float(bleu.score),
        **{kind: float(np.mean([score[kind].fmeasure for score in scores])) for kind in kinds},
    }
