"""An n-gram model in a directory of arrays: written once, mapped into memory by every process that scores with it."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm.data.documents.deduplication.sorted_runs import write_array
from llm.data.documents.ngram_models.tables import ENTRY, UNIGRAM, find, keys_of
from llm.data.documents.ngram_models.tokens import (
    BEGIN,
    SPECIAL,
    Sentences,
    TokenConfig,
    WordTable,
    sentences_of,
    token_names,
)
from llm.data.sources.files import content_digest, file_state, unwritable
from llm.data.vocabularies import Vocabulary, load_vocabulary
from llm.errors import UserError

DESCRIPTION, VOCABULARY = 'ngram_model.json', 'vocabulary'
# Of fewer documents there are no percentiles worth the name.
LEAST_DOCUMENTS = 20
_WORDS, _HASHES, _IDS, _UNIGRAMS = 'words.txt', 'word_hashes.npy', 'word_ids.npy', 'ngrams_1.npy'
_FORMAT = 1
# Characters that are scored at once, of whole documents: what is at hand then stays in the processor's cache.
_CHARACTERS = 1_000_000


@dataclasses.dataclass(frozen=True)
class NgramModel:
    """A model with back-off: p(w | context) of the longest n-gram that is there, times what longer contexts give away.

    Attributes:
        tokens: how texts become tokens. vocabulary: for tokens of that kind.
        word_table: ids of words, for the other kinds. words: all of them in the order of their ids, read when asked.
        unigrams: UNIGRAM [V], by id. tables: of the n-grams of two tokens, of three, and so on.
        percentiles: perplexities of held-out documents at 0, 1, ..., 100 per cent; empty where there are none.
        facts: what else its description says: counts, discounts, where it is from.
        directory: that it is from.
    """

    tokens: TokenConfig
    vocabulary: Vocabulary | None
    word_table: WordTable | None
    unigrams: np.ndarray
    tables: tuple[np.ndarray, ...]
    percentiles: tuple[float, ...]
    facts: dict[str, Any]
    directory: Path | None = None

    @property
    def order(self) -> int:
        """Tokens of the longest n-grams."""
        return len(self.tables) + 1

    def names(self) -> list[str]:
        """Of all tokens by id, as in ARPA files."""
        if self.vocabulary is not None:
            return [*SPECIAL, *token_names(self.vocabulary)]
        assert self.directory is not None
        return [*SPECIAL, *_read_words(self.directory / _WORDS)]

    def sentences(self, texts: Sequence[str]) -> Sentences:
        """The texts as tokens of this model."""
        return sentences_of(texts, self.tokens, self.vocabulary, self.word_table or WordTable(*WordTable.arrays(())))

    def log10_probabilities(self, ids: np.ndarray) -> np.ndarray:
        """float32 [total]: of each token given those before it in its sentence; 0 for <s>.

        Args:
            ids: int64 [total], of sentences with <s> and </s>.
        """
        scores = self.unigrams['probability'][ids]
        begins = ids == BEGIN
        scores[begins] = 0
        position = np.flatnonzero(~begins)
        place = ids[position - 1]
        backoff = self.unigrams['backoff'][place]
        for table in self.tables:
            # Only where a context is there can there be an n-gram, or a back-off.
            places, entries = find(table, keys_of(place, ids[position]))
            there = places >= 0
            hit, missed = position[there], ~there
            scores[hit] = entries['probability']
            scores[position[missed]] += backoff[missed]
            follows = hit + 1 < len(ids)
            follows[follows] &= ~begins[hit[follows] + 1]
            position, place, backoff = hit[follows] + 1, places[there][follows], entries['backoff'][follows]
        return scores

    def perplexities(self, texts: Sequence[str], min_tokens: int = 1) -> np.ndarray:
        """float64 [texts]: per token, </s> of each sentence among them; NaN for texts of fewer tokens.

        What a text gets does not depend on the others, to the last bit.
        """
        result = np.full(len(texts), np.nan)
        first = characters = 0
        for i, text in enumerate(texts):
            characters += len(text)
            if characters >= _CHARACTERS or i + 1 == len(texts):
                result[first : i + 1] = self._perplexities(texts[first : i + 1], min_tokens)
                first, characters = i + 1, 0
        return result

    def _perplexities(self, texts: Sequence[str], min_tokens: int) -> np.ndarray:
        sentences = self.sentences(texts)
        ids, offsets = sentences.ids, sentences.offsets
        result = np.full(len(texts), np.nan)
        some = np.flatnonzero(np.diff(offsets))
        if not len(some):
            return result
        starts = offsets[:-1][some]
        sums = np.add.reduceat(self.log10_probabilities(ids).astype(np.float64), starts)
        numbers = np.add.reduceat((ids != BEGIN).astype(np.int64), starts)
        with np.errstate(over='ignore'):
            result[some] = np.where(numbers >= min_tokens, 10.0 ** (-sums / numbers), np.nan)
        return result


def write_tokens(directory: Path, vocabulary: Vocabulary | None, words: Sequence[str]) -> None:
    """What a model's tokens are."""
    if vocabulary is not None:
        vocabulary.save(directory / VOCABULARY)
        return
    hashes, ids = WordTable.arrays(words)
    write_array(directory / _HASHES, hashes)
    write_array(directory / _IDS, ids)
    (directory / _WORDS).write_text(''.join(f'{word}\n' for word in words), encoding='utf-8', newline='')


def write_table(directory: Path, order: int, table: np.ndarray) -> None:
    """The n-grams of one order."""
    write_array(directory / f'ngrams_{order}.npy', table)


def write_description(directory: Path, tokens: TokenConfig, vocabulary: Vocabulary | None, **facts: Any) -> None:
    """Last of all: it says that the model is whole, and the digest of each file."""
    names = sorted(path.name for path in directory.glob('*') if path.name in (_WORDS, _HASHES, _IDS, _UNIGRAMS))
    names += [f'ngrams_{n}.npy' for n in range(2, facts['order'] + 1)]
    description = {
        'format': _FORMAT,
        'tokens': dataclasses.asdict(tokens),
        'vocabulary': None if vocabulary is None else vocabulary.digest,
        'files': {name: content_digest(str(directory / name)).hex() for name in names},
        **facts,
    }
    partial = directory / f'{DESCRIPTION}.{os.getpid()}.tmp'
    try:
        partial.write_text(json.dumps(description, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
        partial.replace(directory / DESCRIPTION)
    except OSError as error:
        raise unwritable(directory, error, 'arrays') from error


def load_ngram_model(directory: str) -> NgramModel:
    """The model that a directory holds, read once in a process while its description stays.

    Raises:
        UserError: there is none, a file of it is missing or cut, or its vocabulary is another.
    """
    path = Path(directory).expanduser()
    try:
        state = file_state(path / DESCRIPTION)
    except OSError:
        read_description(path)  # says what is wrong
        raise
    return _load_model(path, state)


@functools.lru_cache(maxsize=64)
def _load_model(path: Path, state: tuple[int, int, int]) -> NgramModel:
    description = read_description(path)
    try:
        tokens = TokenConfig(**description['tokens'])
        order, digest, files = int(description['order']), description['vocabulary'], description['files']
        percentiles = tuple(float(value) for value in description.get('percentiles', ()))
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path / DESCRIPTION, f'does not describe an n-gram model ({error!r})') from error
    vocabulary = word_table = None
    if tokens.kind == 'vocabulary':
        vocabulary = load_vocabulary(path / VOCABULARY)
        if vocabulary.digest != digest:
            raise UserError(
                f'is not the vocabulary that the model was estimated with (digest {vocabulary.digest[:12]}, not '
                f'{str(digest)[:12]})',
                where=str(path / VOCABULARY),
                fix='Bring back that vocabulary, or estimate the model again.',
            )
    else:
        hashes = _load(path / _HASHES, np.dtype('u8'))
        word_table = WordTable(hashes, _load(path / _IDS, np.dtype('u4')))
    unigrams = _load(path / _UNIGRAMS, UNIGRAM)
    tables = tuple(_load(path / f'ngrams_{n}.npy', ENTRY) for n in range(2, order + 1))
    size = len(SPECIAL) + (vocabulary.size if vocabulary is not None else len(hashes))
    if len(unigrams) != size or not set(files) >= {f'ngrams_{n}.npy' for n in range(1, order + 1)}:
        raise _damaged(path / _UNIGRAMS, f'has {len(unigrams):,} tokens, and the model {size:,}')
    return NgramModel(tokens, vocabulary, word_table, unigrams, tables, percentiles, description, path)


def read_description(path: Path) -> dict[str, Any]:
    """What ngram_model.json says."""
    if not path.is_dir():
        raise UserError('there is no such directory', where=str(path), fix='Give one that train_ngram_model wrote.')
    try:
        description = json.loads((path / DESCRIPTION).read_text(encoding='utf-8'))
    except FileNotFoundError as error:
        raise UserError(
            f'this is not the directory of an n-gram model: it has no {DESCRIPTION}',
            where=str(path),
            fix='Give one that train_ngram_model or convert_ngram_model wrote to its end.',
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path / DESCRIPTION, f'cannot be read as JSON ({error})') from error
    if not isinstance(description, dict) or description.get('format') != _FORMAT:
        raise UserError(f'is not of format {_FORMAT}', where=str(path / DESCRIPTION), fix='Use the llm that wrote it.')
    return description


def check_content(directory: str) -> str:
    """The digest of a whole model, every file of it compared with what its description says.

    Raises:
        UserError: a file has changed since it was written.
    """
    path = Path(directory).expanduser()
    description = read_description(path)
    for name, digest in description['files'].items():
        if content_digest(str(path / name)).hex() != digest:
            raise _damaged(path / name, f'is not the file that {DESCRIPTION} was written with')
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def percentiles_of(perplexities: np.ndarray) -> list[float]:
    """At 0, 1, ..., 100 per cent, of those that are numbers."""
    known = perplexities[np.isfinite(perplexities)]
    return [float(value) for value in np.percentile(known, np.arange(101))] if len(known) else []


def _load(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, mmap_mode='r', allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, f'cannot be read ({error})') from error
    if array.dtype != dtype or array.ndim != 1:
        raise _damaged(path, f'has {array.dtype} {array.shape}, not {dtype} in one dimension')
    return array


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding='utf-8').split('\n')[:-1]
    except (OSError, ValueError) as error:
        raise _damaged(path, f'cannot be read ({error})') from error


def _damaged(path: Path, what: str) -> UserError:
    return UserError(what, where=str(path), fix='Bring back the whole directory, or estimate the model again.')


def entries_of(tables: Iterable[np.ndarray]) -> list[int]:
    """How many n-grams each table has."""
    return [int((table['key'] != np.uint64(0xFFFF_FFFF_FFFF_FFFF)).sum()) for table in tables]
