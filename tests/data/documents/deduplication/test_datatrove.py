"""Clusters on real articles against datatrove's four steps of MinHash deduplication."""

import gzip

import pytest

from llm.data.documents.deduplication import pipeline
from llm.data.documents.deduplication.config import Deduplication
from tests.data.documents.deduplication.datatrove_clusters import clusters_of_datatrove
from tests.data.documents.deduplication.prepared import rows, write_shards


@pytest.mark.oracle
def test_clusters_of_articles_are_those_of_datatrove(dev_data, tmp_path):
    with gzip.open(dev_data / 'dedup/articles_1000.txt.gz', 'rt', encoding='utf-8') as file:
        articles = [line.rstrip('\n').split(' ', 1) for line in file]
    paired = (dev_data / 'dedup/articles_1000.truth').read_text().split()
    articles = [article for i, article in enumerate(articles) if i < 80 or article[0] in paired]
    clusters = clusters_of_datatrove(articles, tmp_path)
    output = write_shards(tmp_path / 'ours', [[{'id': name, 'text': text} for name, text in articles]])
    counts = pipeline.finish(output, Deduplication(), None, processes=1)
    ours: dict[str, set[str]] = {}
    for row in rows(output, 'verdicts'):
        if row['rule']:
            ours.setdefault(row['representative'], {row['representative']}).add(row['id'])
    assert counts.kept == len(articles) - 10
    assert sorted(map(sorted, ours.values())) == sorted(map(sorted, clusters))
