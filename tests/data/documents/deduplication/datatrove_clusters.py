"""Clusters of near duplicates as datatrove's four steps of MinHash deduplication find them."""

from collections.abc import Sequence
from pathlib import Path


class Splitting:
    """What datatrove is to take for words."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()


def clusters_of_datatrove(articles: Sequence[tuple[str, str]], folder: Path) -> list[list[str]]:
    """Lists of ids, of more than one document each; those that are alike by the default scheme of 14 bands of 8."""
    from datatrove.data import Document
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig

    config = MinhashConfig(hash_config=HashConfig(precision=64, hash_fc='sha1'))
    folders = [str(folder / name) for name in ('signatures', 'buckets', 'removed')]
    documents = [Document(text, name) for name, text in articles]
    # Constructed for a language of which it needs no further package. On such plain text any tokenizer splits alike.
    signatures = MinhashDedupSignature(folders[0], config, language='ace_Arab')
    signatures.word_tokenizer = Splitting()
    signatures.run(iter(documents), rank=0, world_size=1)
    for rank in range(config.num_buckets):
        MinhashDedupBuckets(folders[0], folders[1], config=config).run(None, rank=rank, world_size=config.num_buckets)
    MinhashDedupCluster(folders[1], folders[2], config=config, save_cluster_id=True).run(None, 0, 1)
    kept = list(MinhashDedupFilter(folders[2], load_cluster_ids=True).run(iter(documents), rank=0, world_size=1))
    clusters: dict[int, list[str]] = {}
    for document in documents:
        if (cluster := document.metadata.get('minhash_cluster_id', -1)) >= 0:
            clusters.setdefault(cluster, []).append(document.id)
    found = [some for some in clusters.values() if len(some) > 1]
    assert len(documents) - len(kept) == sum(len(some) - 1 for some in found)
    return found
