"""Groups of alike documents in a sample: what a corpus is about, and of which of it rules leave little."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llm.data.documents.document import not_installed
from llm.data.documents.reporting.config import DataReport

_COMPONENTS = 50
_FEATURES = 1 << 16
_WORDS = 10
_EXCERPT = 120
# Fewer documents have no clusters.
_LEAST = 10
_EXACT = 1_000
# Words of more than this share of all documents name a cluster last; of few documents, or words, all count.
_COMMON, _FEW = 0.1, 100
_WORD = re.compile(r"[^\W\d_]{2,}(?:['’][^\W\d_]+)?")


def find_clusters(
    documents: Sequence[dict[str, Any]],
    config: DataReport,
    embed: Callable[[Sequence[str]], np.ndarray] | None = None,
) -> dict[str, Any] | None:
    """k-means of the documents' excerpts, each cluster with its words and the share that stays; None of too few.

    Vectors are TF-IDF of hashed words, reduced by a truncated singular value decomposition (Deerwester et al. 1990),
    or what `embed` gives. Words of a cluster are those of the highest class-based TF-IDF (Grootendorst 2022, eq. 2).
    The map is t-SNE (van der Maaten & Hinton 2008) of a part.

    Args:
        documents: with 'excerpt', 'removed_by' and 'source'.
    """
    documents = [document for document in documents if _WORD.search(document['excerpt'] or '')]
    if len(documents) < _LEAST or not config.clusters:
        return None
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError as error:
        raise not_installed(error) from error

    texts = [document['excerpt'] for document in documents]
    vectors = _tfidf(texts, config.seed) if embed is None else np.asarray(embed(texts), np.float32)
    count = min(config.clusters, len(documents) // 3)
    means = MiniBatchKMeans(count, random_state=config.seed, n_init=3, batch_size=1024).fit(vectors)
    labels = means.labels_
    words = _words(texts, labels, count)
    stays = np.array([document['removed_by'] is None for document in documents])
    # The largest first.
    order = np.argsort(-np.bincount(labels, minlength=count), kind='stable')
    place = np.argsort(order)
    clusters = []
    for cluster in order.tolist():
        own = labels == cluster
        if not own.any():
            continue
        nearest = np.flatnonzero(own)[np.argsort(means.transform(vectors[own])[:, cluster], kind='stable')[:2]]
        removed: dict[str, int] = {}
        for i in np.flatnonzero(own & ~stays).tolist():
            removed[documents[i]['removed_by']] = removed.get(documents[i]['removed_by'], 0) + 1
        clusters.append(
            {
                'words': words[cluster],
                'documents': int(own.sum()),
                'stays': int((own & stays).sum()),
                'removed': dict(sorted(removed.items(), key=lambda item: -item[1])[:3]),
                'nearest': [documents[i] for i in nearest.tolist()],
            }
        )
    shown = np.arange(min(config.points, len(documents)))  # documents are in the order of a hash
    places = _plane(vectors[shown], config.seed)
    points = [
        {
            'x': round(float(x), 3),
            'y': round(float(y), 3),
            'cluster': int(place[labels[i]]),
            'removed_by': documents[i]['removed_by'],
            'source': documents[i]['source'],
            'excerpt': ' '.join(texts[i].split())[:_EXCERPT],
        }
        for i, (x, y) in zip(shown.tolist(), places, strict=True)
    ]
    return {
        'documents': len(documents),
        'by': 'TF-IDF of hashed words' if embed is None else 'vectors of an encoder',
        'clusters': clusters,
        'points': points,
    }


def _tfidf(texts: Sequence[str], seed: int) -> np.ndarray:
    """float32 [texts, components], of length 1."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
    from sklearn.preprocessing import normalize

    counts = HashingVectorizer(analyzer=_words_of, n_features=_FEATURES, alternate_sign=False, norm=None)
    found = counts.transform(texts)
    having = np.asarray((found > 0).sum(0)).ravel()
    telling = (having > 0) & (having <= 2 * _COMMON * len(texts))
    if telling.sum() > _FEW:  # what many documents have says little of what one is about
        found = found[:, telling]
    weights = TfidfTransformer(sublinear_tf=True).fit_transform(found)
    components = min(_COMPONENTS, len(texts) - 1, found.shape[1] - 1)
    with np.errstate(invalid='ignore', divide='ignore'):  # shares of no variance, which nothing reads
        reduced = TruncatedSVD(components, random_state=seed).fit_transform(weights)
    return np.asarray(normalize(reduced), np.float32)


def _words_of(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def _words(texts: Sequence[str], labels: np.ndarray, count: int) -> list[list[str]]:
    """Of each cluster: frequency in it times log(1 + words of an average cluster / frequency in all)."""
    from sklearn.feature_extraction.text import CountVectorizer

    vectorizer = CountVectorizer(analyzer=_words_of, max_features=50_000)
    counts = vectorizer.fit_transform(texts)
    sums = np.stack([np.asarray(counts[labels == i].sum(0)).ravel() for i in range(count)]).astype(np.float64)
    frequency = sums / np.maximum(1, sums.sum(1, keepdims=True))
    weights = frequency * np.log(1 + sums.sum() / count / np.maximum(1, sums.sum(0)))
    having = np.asarray((counts > 0).sum(0)).ravel()
    if len(texts) > _FEW:  # words of very many documents, or of one, come last
        weights[:, (having > _COMMON * len(texts)) | (having < 2)] *= 1e-6
    names = vectorizer.get_feature_names_out()
    best = np.argsort(-weights, axis=1, kind='stable')[:, :_WORDS]
    return [[str(names[j]) for j in row if sums[i, j]] for i, row in enumerate(best)]


def _plane(vectors: np.ndarray, seed: int) -> np.ndarray:
    """[points, 2], from 0 to 1."""
    if len(np.unique(vectors, axis=0)) < _LEAST:  # copies of few texts have no neighbourhoods
        return np.zeros((len(vectors), 2))
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(vectors) - 1) / 3)
    # Of so few points the exact gradient is the faster one, and these steps are enough.
    method = 'exact' if len(vectors) <= _EXACT else 'barnes_hut'
    map_of = TSNE(2, perplexity=perplexity, init='pca', max_iter=500, method=method, random_state=seed, n_jobs=1)
    places = map_of.fit_transform(vectors)
    low, high = places.min(0), places.max(0)
    return (places - low) / np.maximum(high - low, 1e-9)
