"""Clusters on real articles against datatrove's four steps of MinHash deduplication."""

import gzip

import pytest

from llm.data.documents.deduplication import pipeline
from llm.data.documents.deduplication.config import Deduplication
from tests.data.documents.deduplication.prepared import rows, write_shards


class Splitting:
    """What datatrove is to take for words."""

    def word_tokenize(self, text):
        return text.split()


@pytest.mark.oracle
def test_clusters_of_articles_are_those_of_datatrove(dev_data, tmp_path):
    from datatrove.data import Document
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig

    with gzip.open(dev_data / 'dedup/articles_1000.txt.gz', 'rt', encoding='utf-8') as file:
        articles = [line.rstrip('\n').split(' ', 1) for line in file]
    paired = (dev_data / 'dedup/articles_1000.truth').read_text().split()
    articles = [article for i, article in enumerate(articles) if i < 80 or article[0] in paired]
    config = MinhashConfig(hash_config=HashConfig(precision=64, hash_fc='sha1'))
    folders = [str(tmp_path / name) for name in ('signatures', 'buckets', 'removed')]
    documents = [Document(text, name) for name, text in articles]
    # Constructed for a language of which it needs no further package. On such plain text any tokenizer splits alike.
    signatures = MinhashDedupSignature(folders[0], config, language='ace_Arab')
    signatures.word_tokenizer = Splitting()
    signatures.run(iter(documents), rank=0, world_size=1)
    for rank in range(config.num_buckets):
        MinhashDedupBuckets(folders[0], folders[1], config=config).run(None, rank=rank, world_size=config.num_buckets)
    MinhashDedupCluster(folders[1], folders[2], config=config, save_cluster_id=True).run(None, 0, 1)
    filtered = MinhashDedupFilter(folders[2], load_cluster_ids=True).run(iter(documents), rank=0, world_size=1)
    kept = {document.id for document in filtered}
    clusters: dict[int, list[str]] = {}
    for document in documents:
        if (cluster := document.metadata.get('minhash_cluster_id', -1)) >= 0:
            clusters.setdefault(cluster, []).append(document.id)

    output = write_shards(tmp_path / 'ours', [[{'id': name, 'text': text} for name, text in articles]])
    counts = pipeline.finish(output, Deduplication(), None, processes=1)
    ours: dict[str, set[str]] = {}
    for row in rows(output, 'verdicts'):
        if row['rule']:
            ours.setdefault(row['representative'], {row['representative']}).add(row['id'])
    assert len(kept) == counts.kept == len(articles) - 10
    assert sorted(map(sorted, ours.values())) == sorted(sorted(some) for some in clusters.values() if len(some) > 1)
