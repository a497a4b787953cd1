"""How a vocabulary fits the documents that stay, measured on a sample of their texts."""

import re
from typing import Any

import numpy as np

from llm.data.documents.reporting.config import DataReport
from llm.data.documents.reporting.counting import UNKNOWN
from llm.data.documents.reporting.ledger import Ledger, source_of
from llm.data.documents.reporting.sampling import hashes
from llm.data.vocabularies import Vocabulary

_WORD = re.compile(r'\S+')
_LISTED = 40
# Of one text; of a book, its beginning.
_MOST = 20_000
# Of one source, what is read at most: bytes of row groups, before the first one beyond, and files.
_READ_BYTES, _READ_FILES = 1 << 27, 256


class _Fit:
    """Sums over texts."""

    def __init__(self) -> None:
        self.documents = self.bytes = self.words = self.tokens = 0
        self.unknown = self.single = self.partial = 0

    def as_json(self) -> dict[str, Any]:
        tokens = max(1, self.tokens)
        return {
            'documents': self.documents,
            'bytes': self.bytes,
            'tokens': self.tokens,
            'bytes_per_token': self.bytes / tokens,
            'tokens_per_word': self.tokens / max(1, self.words),
            'unknown_share': self.unknown / tokens,
            'single_byte_share': self.single / tokens,
            'partial_share': self.partial / tokens,
        }


def analyse(ledger: Ledger, vocabulary: Vocabulary, path: str, config: DataReport) -> dict[str, Any]:
    """By source and language: bytes per token, tokens per word, tokens of a part of a character; tokens used most.

    Of each source some row groups of documents/ are read, and of those the texts with the smallest hashes.
    """
    table = vocabulary.token_bytes()
    # A byte that is a character by itself is no fallback.
    single = np.array([len(token) == 1 and token[0] >= 0x80 for token in table])
    partial = np.array([not _is_text(token) for token in table])
    uses = np.zeros(vocabulary.size, np.int64)
    fits: dict[str, dict[str, _Fit]] = {'source': {}, 'language': {}}
    for source, texts in _texts(ledger, config).items():
        for (language, text), ids in zip(texts, vocabulary.encode_batch(text for _, text in texts), strict=True):
            uses += np.bincount(ids, minlength=vocabulary.size)
            for kind, name in (('source', source), ('language', language or UNKNOWN)):
                fit = fits[kind].setdefault(name, _Fit())
                fit.documents += 1
                fit.bytes += len(text.encode())
                fit.words += sum(1 for _ in _WORD.finditer(text))
                fit.tokens += len(ids)
                fit.unknown += 0 if vocabulary.unk_id is None else int((ids == vocabulary.unk_id).sum())
                fit.single += int(single[ids].sum())
                fit.partial += int(partial[ids].sum())
    used = np.flatnonzero(uses)
    lengths = np.array([len(token) for token in table])

    def listed(order: np.ndarray) -> list[dict[str, Any]]:
        return [
            {'id': i, 'text': table[i].decode(errors='backslashreplace'), 'bytes': len(table[i]), 'uses': int(uses[i])}
            for i in order[:_LISTED].tolist()
        ]

    return {
        'vocabulary': path,
        'size': vocabulary.size,
        'used': len(used),
        **{
            kind: {name: fit.as_json() for name, fit in sorted(by.items(), key=lambda item: -item[1].bytes)}
            for kind, by in fits.items()
        },
        'most_used': listed(used[np.argsort(-uses[used], kind='stable')]),
        'longest': listed(used[np.lexsort((-uses[used], -lengths[used]))]),
    }


def _is_text(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


def _texts(ledger: Ledger, config: DataReport) -> dict[str, list[tuple[str | None, str]]]:
    """source -> (language, beginning of the text) of some documents, of about `token_bytes` each."""
    import pyarrow.parquet

    # A file is of one source.
    files: dict[str, list[tuple[int, int, int]]] = {}
    for shard in ledger.chosen:
        file = pyarrow.parquet.ParquetFile(ledger.directory / 'documents' / ledger.shards[shard].name)
        if file.num_row_groups:
            name = source_of(file) or UNKNOWN
            sizes = (file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups))
            files.setdefault(name, []).extend((shard, group, size) for group, size in enumerate(sizes))
    result: dict[str, list[tuple[str | None, str]]] = {}
    for source, groups in files.items():
        order = np.argsort(hashes([f'{shard}:{group}' for shard, group, _ in groups], config.seed))
        some: list[tuple[str | None, str]] = []
        left, read = config.token_bytes, 0
        for i in order[:_READ_FILES].tolist():
            shard, group, size = groups[i]
            read += size
            path = ledger.directory / 'documents' / ledger.shards[shard].name
            columns = pyarrow.parquet.ParquetFile(path).read_row_group(group, columns=['id', 'language', 'text'])
            ids = columns['id'].to_pylist()
            for row in np.argsort(hashes(ids, config.seed)).tolist():
                text = columns['text'][row].as_py()[:_MOST]
                some.append((columns['language'][row].as_py(), text))
                left -= len(text.encode())
                if left <= 0:
                    break
            if left <= 0 or read > _READ_BYTES:
                break
        result[source] = some
    return result
