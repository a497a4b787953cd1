"""A directory with an n-gram model, from texts."""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llm.data.documents.ngram_models.estimating import Estimate, KneserNey
from llm.data.documents.ngram_models.model import (
    NgramModel,
    entries_of,
    percentiles_of,
    write_description,
    write_table,
    write_tokens,
)
from llm.data.documents.ngram_models.tokens import MAX_TOKENS, SPECIAL, TokenConfig, WordIndex, WordTable, sentences_of
from llm.data.sources.files import unwritable
from llm.data.vocabularies import Vocabulary
from llm.errors import UserError

_WORK = 'work'
_CHARACTERS = 4_000_000


def build_ngram_model(
    texts: Iterable[str],
    held_out: Iterable[str],
    directory: Path,
    *,
    config: KneserNey,
    tokens: TokenConfig,
    vocabulary: Vocabulary | None = None,
    memory_bytes: int = 1 << 30,
    min_tokens: int = 1,
) -> dict[str, Any]:
    """Estimate a model of texts, measure it on others, and write it; returns what its description says.

    Args:
        held_out: documents of which the percentiles of perplexity are told; those of fewer than `min_tokens` do not
            count.
        memory_bytes: for sorting counts. The tables, and arrays of the n-grams of a length, come beside it.

    Raises:
        UserError: there is no text, the vocabulary is too large, or the disk is full.
    """
    if vocabulary is not None and vocabulary.size + len(SPECIAL) > MAX_TOKENS:
        raise UserError(f'the vocabulary has {vocabulary.size:,} tokens, more than {MAX_TOKENS - len(SPECIAL):,}')
    index = WordIndex()
    work = directory / _WORK
    numbers = {'text_documents': 0, 'text_tokens': 0}

    def batches() -> Iterator[np.ndarray]:
        for batch in _batches(texts):
            sentences = sentences_of(batch, tokens, vocabulary, index)
            numbers['text_documents'] += len(batch)
            numbers['text_tokens'] += len(sentences.ids)
            if len(sentences.ids):
                yield sentences.ids

    def num_tokens() -> int:
        return len(SPECIAL) + (len(index.words) if vocabulary is None else vocabulary.size)

    try:
        shutil.rmtree(work, ignore_errors=True)
        estimate = Estimate(config, work, num_tokens)
        tables = []
        for n, table in enumerate(estimate(batches(), memory_bytes), start=1):
            write_table(directory, n, table)
            tables.append(np.load(directory / f'ngrams_{n}.npy', mmap_mode='r'))
        write_tokens(directory, vocabulary, index.words)
        word_table = None if vocabulary is not None else WordTable(*WordTable.arrays(index.words))
        model = NgramModel(tokens, vocabulary, word_table, tables[0], tuple(tables[1:]), (), {}, directory)
        parts = [model.perplexities(batch, min_tokens) for batch in _batches(held_out)]
        measured = np.concatenate([np.zeros(0), *parts])
        facts = {
            'order': config.order,
            **numbers,
            'ngrams': [num_tokens(), *entries_of(tables[1:])],
            'prune': [config.threshold(n) for n in range(1, config.order + 1)],
            'discounts': estimate.discounts,
            'fallback_discounts': estimate.fallbacks,
            'held_out_documents': int(np.isfinite(measured).sum()),
            'percentiles': percentiles_of(measured),
        }
        write_description(directory, tokens, vocabulary, **facts)
    except OSError as error:
        raise unwritable(directory, error, 'models') from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return facts


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in groups of about so many characters."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
