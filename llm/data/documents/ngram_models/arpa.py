"""ARPA files, in which other programs (KenLM, SRILM) keep n-gram models: read into a directory of ours, and written."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from llm.data.documents.ngram_models.counting import MAX_ORDER
from llm.data.documents.ngram_models.model import (
    NgramModel,
    entries_of,
    write_description,
    write_table,
    write_tokens,
)
from llm.data.documents.ngram_models.tables import UNIGRAM, build_table, find, keys_of, split_keys
from llm.data.documents.ngram_models.tokens import BEGIN, MAX_TOKENS, SPECIAL, UNKNOWN, TokenConfig, token_names
from llm.data.sources.files import split_stream, stream_bytes, unwritable
from llm.data.vocabularies import Vocabulary
from llm.errors import UserError

_COUNT = re.compile(rb'ngram (\d+)\s*=\s*(\d+)')
# What KenLM gives to a token that a model knows nothing of, not even <unk>.
_NEVER = -100.0
_LINES = 1 << 20


def read_arpa(path: str, directory: Path, tokens: TokenConfig, vocabulary: Vocabulary | None = None) -> None:
    """An ARPA file (plain, .gz, .zst or .bz2) as a model in `directory`.

    Args:
        tokens: how texts become the tokens of the file. vocabulary: for tokens of that kind; its tokens are looked for
            by their names.

    Raises:
        UserError: a line is wrong, or names what the vocabulary lacks; it says which.
    """
    reader = _Lines(path)
    counts = _counts(reader)
    order = len(counts)
    section = _Section(reader, 1, counts[0], backoffs=order > 1)
    words: list[str] = []
    known = SPECIAL if vocabulary is None else [*SPECIAL, *token_names(vocabulary)]
    ids = {name.encode(): i for i, name in enumerate(known)}
    entries: dict[int, tuple[float, float]] = {}
    for (name,), probability, backoff in section:
        if name not in ids:
            if vocabulary is not None:
                raise reader.error(f'{_shown(name)} is no token of the vocabulary', 'Give the one of this model.')
            if len(ids) >= MAX_TOKENS:
                raise reader.error(f'more than {MAX_TOKENS:,} tokens', 'Use a model of fewer.')
            ids[name] = len(ids)
            words.append(name.decode(errors='replace'))
        if ids[name] in entries:
            raise reader.error(f'{_shown(name)} is there twice')
        entries[ids[name]] = probability, backoff
    size = len(SPECIAL) + (len(words) if vocabulary is None else vocabulary.size)
    unigrams = np.zeros(size, UNIGRAM)
    unknown = entries.get(UNKNOWN, (_NEVER, 0.0))[0]
    unigrams['probability'] = unknown
    for i, entry in entries.items():
        unigrams[i] = entry
    unigrams['probability'][BEGIN] = 0
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_table(directory, 1, unigrams)
        tables: list[np.ndarray] = []
        for n in range(2, order + 1):
            tables.append(_read_table(_Section(reader, n, counts[n - 1], backoffs=n < order), ids, tables))
            write_table(directory, n, tables[-1])
        if reader.next() != b'\\end\\':
            raise reader.error('is not \\end\\', 'The file may be cut short.')
        write_tokens(directory, vocabulary, words)
        write_description(
            directory, tokens, vocabulary, order=order, ngrams=[size, *entries_of(tables)], read_from=path
        )
    except OSError as error:
        raise unwritable(directory, error, 'models') from error


def _read_table(section: '_Section', ids: dict[bytes, int], tables: list[np.ndarray]) -> np.ndarray:
    """The table of one order, those of shorter n-grams being there."""
    reader, n = section.reader, section.length
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for lines in section.blocks():
        first_line = reader.number - len(lines) + 1
        try:
            tokens = np.array([[ids[name] for name in names] for names, _, _ in lines], np.int64)
        except KeyError as error:
            name = error.args[0]
            number = next(i for i, (names, _, _) in enumerate(lines) if name in names)
            raise reader.error(f'{_shown(name)} is no 1-gram', line=first_line + number) from error
        places = tokens[:, 0]
        for k in range(2, n):
            places, _ = find(tables[k - 2], keys_of(places, tokens[:, k - 1]))
            if (places < 0).any():
                number = int(np.argmax(places < 0))
                context = b' '.join(lines[number][0][:-1])
                raise reader.error(
                    f'there is no {n - 1}-gram {_shown(context)}, the context of this one',
                    'Write the model with a program that keeps contexts, as lmplz or SRILM do.',
                    line=first_line + number,
                )
        values = np.array([(probability, backoff) for _, probability, backoff in lines], np.float32)
        parts.append((keys_of(places, tokens[:, -1]), values[:, 0], values[:, 1]))
    if not parts:
        return build_table(np.zeros(0, np.uint64), np.zeros(0), np.zeros(0))[0]
    keys, probabilities, backoffs = (np.concatenate(column) for column in zip(*parts, strict=True))
    try:
        return build_table(keys, probabilities, backoffs)[0]
    except ValueError as error:
        raise reader.error(f'{error} among the {n}-grams', line=None) from error


class _Lines:
    """Lines of a file without the blank ones, and where they are."""

    def __init__(self, path: str):
        self.path, self.number = path, 0
        self.again: bytes | None = None  # a line to give once more
        self._lines = split_stream(stream_bytes(path), b'\n')

    def next(self) -> bytes:
        """The next line, without white space around; raises UserError at the end."""
        if self.again is not None:
            line, self.again = self.again, None
            return line
        for line in self._lines:
            self.number += 1
            stripped = line.strip()
            if stripped:
                return stripped
        raise UserError('ends before \\end\\', where=self.path, fix='The file may be cut short.')

    def error(self, what: str, fix: str = '', line: int | None = -1) -> UserError:
        """What is wrong with the line that was read last, or another, or the file."""
        number = self.number if line == -1 else line
        where = self.path if number is None else f'{self.path}:{number}'
        return UserError(what, where=where, fix=fix or 'Give a whole ARPA file, as lmplz writes it.')


@dataclasses.dataclass
class _Section:
    """The n-grams of one length: `number` lines of probability, tokens and perhaps back-off."""

    reader: _Lines
    length: int
    number: int
    backoffs: bool

    def __iter__(self) -> Iterator[tuple[tuple[bytes, ...], float, float]]:
        reader, n = self.reader, self.length
        if reader.next() != b'\\%d-grams:' % n:
            raise reader.error(f'is not \\{n}-grams:, after as many lines as ngram {n - 1}= says')
        for _ in range(self.number):
            fields = reader.next().split()
            try:
                probability = float(fields[0])
                backoff = float(fields[n + 1]) if len(fields) == n + 2 and self.backoffs else 0.0
            except ValueError as error:
                raise reader.error(f'is no {n}-gram: {_shown(b" ".join(fields))}') from error
            if not n + 1 <= len(fields) <= n + 1 + self.backoffs or not -1e6 < probability <= 0 or backoff != backoff:  # noqa: PLR0124
                raise reader.error(f'is no {n}-gram: {_shown(b" ".join(fields))}')
            yield tuple(fields[1 : n + 1]), probability, backoff

    def blocks(self) -> Iterator[list[tuple[tuple[bytes, ...], float, float]]]:
        """The n-grams in lists."""
        lines: list[tuple[tuple[bytes, ...], float, float]] = []
        for line in self:
            lines.append(line)
            if len(lines) == _LINES:
                yield lines
                lines = []
        if lines:
            yield lines


def _counts(reader: _Lines) -> list[int]:
    """How many n-grams of each length there are; the line after them is left to the next to read."""
    if reader.next() != b'\\data\\':
        raise reader.error('is not \\data\\, with which an ARPA file begins')
    counts: list[int] = []
    while (match := _COUNT.fullmatch(line := reader.next())) and int(match[1]) == len(counts) + 1:
        counts.append(int(match[2]))
    if line != b'\\1-grams:' or not counts:
        raise reader.error(f'is not ngram {len(counts) + 1}=NUMBER: {_shown(line)}')
    if not 2 <= len(counts) <= MAX_ORDER:
        raise reader.error(f'n-grams of up to {len(counts)} tokens, not of 2 to {MAX_ORDER}', line=None)
    reader.again = line
    return counts


def _shown(name: bytes) -> str:
    return repr(name[:80].decode(errors='replace'))


def write_arpa(model: NgramModel, path: Path) -> None:
    """A model as an ARPA file."""
    partial = path.with_name(f'{path.name}.partial')
    names = model.names()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open('w', encoding='utf-8', newline='') as file:
            _write(model, names, file)
        partial.replace(path)
    except OSError as error:
        raise unwritable(path, error, 'models') from error


def _write(model: NgramModel, names: list[str], file: IO[str]) -> None:
    counts = [len(model.unigrams), *entries_of(model.tables)]
    file.write('\\data\\\n' + ''.join(f'ngram {n}={count}\n' for n, count in enumerate(counts, start=1)))
    file.write('\n\\1-grams:\n')
    for name, (probability, backoff) in zip(names, model.unigrams.tolist(), strict=True):
        file.write(f'{probability:.9g}\t{name}\t{backoff:.9g}\n')
    for n, table in enumerate(model.tables, start=2):
        file.write(f'\n\\{n}-grams:\n')
        used = np.flatnonzero(table['key'] != np.uint64(0xFFFF_FFFF_FFFF_FFFF))
        for start in range(0, len(used), _LINES):
            some = table[used[start : start + _LINES]]
            columns = _tokens_of(model, n, some['key'])
            rows = zip(*columns, some['probability'].tolist(), some['backoff'].tolist(), strict=True)
            for *tokens, probability, backoff in rows:
                text = ' '.join([names[token] for token in tokens])
                tail = f'\t{backoff:.9g}' if n < model.order else ''
                file.write(f'{probability:.9g}\t{text}{tail}\n')
    file.write('\n\\end\\\n')


def _tokens_of(model: NgramModel, n: int, keys: np.ndarray) -> list[list[int]]:
    """Ids of the tokens of n-grams, a list for each of the n places."""
    columns = []
    for k in range(n, 1, -1):
        places, last = split_keys(keys)
        columns.append(last.tolist())
        if k > 2:
            keys = model.tables[k - 3]['key'][places]
    return [places.tolist(), *columns[::-1]]
