"""The shared pages of Zyte's article-extraction-benchmark, and its score of the texts that were extracted from them."""

import collections
import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path


def read_pages(dev_data: Path) -> tuple[list[str], list[str]]:
    """(pages as HTML, the text that a person marked in each)."""
    folder = dev_data / 'web' / 'articles'
    truth = json.loads(gzip.decompress((folder / 'ground_truth.json.gz').read_bytes()))
    names = sorted(truth)
    pages = [gzip.decompress((folder / 'html' / f'{name}.html.gz').read_bytes()) for name in names]
    return [page.decode(errors='replace') for page in pages], [truth[name]['articleBody'] for name in names]


def shingles(text: str) -> collections.Counter[tuple[str, ...]]:
    """Four words in a row, as the benchmark counts them."""
    words = re.findall(r'\w+', text)
    return collections.Counter(tuple(words[i : i + 4]) for i in range(max(1, len(words) - 3)))


def f1(texts: Sequence[str], truth: Sequence[str]) -> float:
    """Of all pages: shares of right, wrong and missing shingles of each page are added up."""
    total: dict[str, float] = collections.defaultdict(float)
    for text, article in zip(texts, truth, strict=True):
        found, wanted = shingles(text), shingles(article)
        parts = {'right': found & wanted, 'wrong': found - wanted, 'missing': wanted - found}
        size = sum(part.total() for part in parts.values())
        for part, counts in parts.items():
            total[part] += counts.total() / size
    precision, recall = (total['right'] / (total['right'] + total[other]) for other in ('wrong', 'missing'))
    return 2 * precision * recall / (precision + recall)
