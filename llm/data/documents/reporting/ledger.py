"""The ledger of a directory of prepared documents, read in batches, with the verdicts of the phases over all shards."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm.data.documents.bounds import Bounds
from llm.data.documents.stage import Chain
from llm.data.documents.tokens import TokenCount
from llm.data.token_cache_building import write_json
from llm.errors import UserError

# What stages judged by, for reports on a directory whose configuration is not at hand.
RULES_FILE = 'rules.json'
_BATCH = 1 << 14
# The order in which documents go through rules over all shards; others come behind.
_FINAL_RULES = ('id', 'url', 'document', 'near_duplicate', 'contamination', 'lines', 'paragraphs', 'passages')
NAMES = ('id', 'source', 'url', 'domain', 'date', 'licence', 'language', 'excerpt')


def write_rules(directory: Path, chain: Chain) -> None:
    """What the stages judge by, and the vocabulary that they count tokens with, for `Ledger`."""
    vocabulary = next((stage.vocabulary for stage in chain.stages if isinstance(stage, TokenCount)), None)
    bounds = [dataclasses.asdict(limit) for limit in chain.bounds]
    write_json(directory / RULES_FILE, {'bounds': bounds, 'vocabulary': vocabulary})


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of the ledger. R rules of stages, D rows.

    Attributes:
        shard: number of the file. names: of NAMES those that were asked for, as Arrow arrays.
        keep: bool [R, D]. values: float32 [R, D], NaN where a rule has no figure.
        outcomes: int [D]: the first rule that removed it, by its place in Ledger.all_rules; len(all_rules) if it stays.
        characters, kept_characters: int64 [D], after the stages, and of what stays at last (0 of what was removed).
        tokens: float64 [D]; None if no stage counted them.
        document_rows: int64 [D]: the row in documents/N.parquet, -1 if it is not there.
        representatives: Arrow array [D]: the id of the document that stays for it, or the evaluation item; None
            without phases over all shards.
    """

    shard: int
    names: dict[str, Any]
    keep: np.ndarray
    values: np.ndarray
    outcomes: np.ndarray
    characters: np.ndarray
    kept_characters: np.ndarray
    tokens: np.ndarray | None
    document_rows: np.ndarray
    representatives: Any

    @property
    def measures(self) -> np.ndarray:
        """float64 [3, D]: 1, characters, and tokens, 0 where none were counted."""
        ones = np.ones(len(self.outcomes))
        tokens = np.zeros(len(self.outcomes)) if self.tokens is None else np.nan_to_num(self.tokens)
        return np.stack([ones, self.characters.astype(np.float64), tokens])


class Ledger:
    """What `prepare_data` wrote.

    Args:
        documents: that are read at most; of more, whole files of each source, at least one, chosen by a hash.

    Attributes:
        chosen: numbers of the files that are read.
        rules: of the stages, in order. final_rules: that removed something over all shards. all_rules: both.
        bounds: what rules judge by. vocabulary: that tokens were counted with, if they were.
        final: whether phases over all shards have ended.

    Raises:
        UserError: the directory holds no finished run, or files that do not fit each other.
    """

    def __init__(self, directory: Path, documents: int | None = None):
        import pyarrow.parquet

        self.directory = directory
        self.shards = sorted(path for path in (directory / 'ledger').glob('*.parquet'))
        self.summary = _json(directory / 'summary.json')
        if not self.shards or self.summary is None:
            raise UserError(
                'holds no run of prepare_data that has ended (there is no summary.json, or no ledger/)',
                where=str(directory),
                fix='Give the output_directory of one.',
            )
        self._parquet = pyarrow.parquet
        with self._opened(self.shards[0]) as file:
            columns = file.schema_arrow.names
        self.rules = tuple(name.removesuffix('.keep') for name in columns if name.endswith('.keep'))
        self.final_counts = _json(directory / 'final.json')
        self.final = self.final_counts is not None
        removed = (self.final_counts or {}).get('removed', {})
        known = [rule for rule in _FINAL_RULES if rule in removed]
        self.final_rules = (*known, *sorted(set(removed) - set(known)))
        self.all_rules = (*self.rules, *self.final_rules)
        described = _json(directory / RULES_FILE) or {}
        self.bounds = tuple(Bounds(**fields) for fields in described.get('bounds', ()))
        self.vocabulary: str | None = described.get('vocabulary')
        self.has_tokens = 'tokens' in self.rules
        self.chosen = self._choose(documents)

    def bounds_of(self, rule: str) -> tuple[Bounds, ...]:
        """What a rule judges by; the first is for all documents that no other is for."""
        return tuple(bounds for bounds in self.bounds if bounds.rule == rule)

    def batches(
        self, names: Sequence[str] = NAMES, *, verdicts: bool = True, shards: Sequence[int] | None = None
    ) -> Iterator[Rows]:
        """All rows.

        Args:
            names: of NAMES, what is read. verdicts: whether keep and values are.
            shards: numbers of files, None for those chosen.
        """
        rules = self.rules if verdicts else ()
        columns = [*names, 'removed_by', 'characters', *(f'{rule}.{what}' for rule in rules for what in _WHATS)]
        if self.has_tokens and not verdicts:
            columns.append('tokens.value')
        numbers = {rule: i for i, rule in enumerate(self.all_rules)}
        for shard in self.chosen if shards is None else shards:
            final = _Verdicts(self, self.shards[shard].name) if self.final else None
            document = 0
            with self._opened(self.shards[shard]) as file:
                for batch in self._batches_of(file, self.shards[shard], columns):
                    outcomes = _codes(batch.column('removed_by'), numbers)
                    stays = outcomes == len(numbers)
                    characters = batch.column('characters').to_numpy()
                    rows = np.where(stays, document + np.cumsum(stays) - 1, -1)
                    document += int(stays.sum())
                    kept = np.where(stays, characters, 0)
                    representatives = None
                    if final is not None:
                        ids = batch.column('id') if 'id' in names else None
                        some, representatives, kept_now = final.take(stays, ids)
                        outcomes[stays] = _codes(some, numbers)
                        kept[stays] = kept_now
                    yield Rows(
                        shard,
                        {name: batch.column(name) for name in names},
                        _stacked([_booleans(batch.column(f'{rule}.keep')) for rule in rules], np.bool_, len(outcomes)),
                        _stacked([_floats(batch.column(f'{rule}.value')) for rule in rules], np.float32, len(outcomes)),
                        outcomes,
                        characters,
                        kept,
                        _floats(batch.column('tokens.value')).astype(np.float64) if self.has_tokens else None,
                        rows,
                        representatives,
                    )

    def _choose(self, documents: int | None) -> list[int]:
        every = list(range(len(self.shards)))
        if documents is None:
            return every
        rows: list[int] = []
        by_source: dict[str | None, list[int]] = {}
        for shard in every:
            with self._opened(self.shards[shard]) as file:
                rows.append(file.metadata.num_rows)
                by_source.setdefault(source_of(file), []).append(shard)
        if sum(rows) <= documents:
            return every
        some = [
            sorted(shards, key=lambda shard: hashlib.sha256(self.shards[shard].name.encode()).digest())
            for shards in by_source.values()
        ]
        chosen, left = [shards[0] for shards in some], documents
        left -= sum(rows[shard] for shard in chosen)
        for shard in (shard for each in itertools.zip_longest(*(shards[1:] for shards in some)) for shard in each):
            if shard is not None and rows[shard] <= left:
                chosen.append(shard)
                left -= rows[shard]
        return sorted(chosen)

    def check_documents(self) -> None:
        """Raises UserError where a chosen file of documents/ is missing, cut, or has other than the kept documents."""
        if not (self.directory / 'documents').is_dir():  # the run wrote them elsewhere
            return
        for shard in self.chosen:
            path = self.directory / 'documents' / self.shards[shard].name
            kept = 0
            with self._opened(self.shards[shard]) as file:
                for batch in self._batches_of(file, self.shards[shard], ['removed_by']):
                    kept += batch.column('removed_by').null_count
            with self._opened(path) as file:
                rows = file.metadata.num_rows
            if rows != kept:
                raise UserError(
                    f'has {rows:,} documents, and the ledger says {kept:,}',
                    where=str(path),
                    fix='Bring back what was there, or prepare the documents again.',
                )

    def texts(self, shard: int, rows: Sequence[int]) -> list[str]:
        """Texts of documents/N.parquet, of which only the row groups that hold them are read."""
        with self._opened(self.directory / 'documents' / self.shards[shard].name) as file:
            starts = np.cumsum([0, *(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))])
            found: dict[int, str] = {}
            groups = np.searchsorted(starts, rows, side='right') - 1
            for group in np.unique(groups):
                column = file.read_row_group(int(group), columns=['text']).column('text')
                for row in np.asarray(rows)[groups == group].tolist():
                    found[row] = column[row - int(starts[group])].as_py()
        return [found[row] for row in rows]

    def _opened(self, path: Path) -> Any:
        try:
            return self._parquet.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise UserError(f'cannot be read ({error})', where=str(path), fix='Run prepare_data again.') from error

    def _batches_of(self, file: Any, path: Path, columns: list[str]) -> Iterator[Any]:
        if missing := set(columns) - set(file.schema_arrow.names):
            raise UserError(f'has no columns {sorted(missing)[:3]}', where=str(path), fix='Run prepare_data again.')
        try:
            yield from file.iter_batches(_BATCH, columns=columns)
        except (OSError, ValueError) as error:
            raise UserError(f'cannot be read ({error})', where=str(path), fix='Run prepare_data again.') from error


def source_of(file: Any) -> str | None:
    """The source of a Parquet file's documents, as its statistics say; a file is of one source."""
    if not file.num_row_groups:
        return None
    statistics = file.metadata.row_group(0).column(file.schema_arrow.names.index('source')).statistics
    return statistics.min if statistics is not None and statistics.has_min_max else None


_WHATS = ('keep', 'value')


class _Verdicts:
    """The rows of verdicts/N.parquet in step with those of the ledger that its documents come from."""

    def __init__(self, ledger: Ledger, name: str):
        import pyarrow

        self._path = ledger.directory / 'verdicts' / name
        columns = ['id', 'rule', 'representative', 'kept_characters']
        self._batches = ledger._batches_of(ledger._opened(self._path), self._path, columns)
        self._pyarrow, self._left = pyarrow, None

    def take(self, stays: np.ndarray, ids: Any) -> tuple[Any, Any, np.ndarray]:
        """(rule of each row that stays, representative of each row, characters left of each row that stays)."""
        count = int(stays.sum())
        parts: list[Any] = [] if self._left is None else [self._left]
        while sum(len(part) for part in parts) < count and (batch := next(self._batches, None)) is not None:
            parts.append(self._pyarrow.Table.from_batches([batch]))
        if not parts:
            return self._pyarrow.array([], 'string'), self._pyarrow.nulls(len(stays), 'string'), np.zeros(0, np.int64)
        table = self._pyarrow.concat_tables(parts)
        some, self._left = table.slice(0, count).combine_chunks(), table.slice(count)
        if len(some) < count or (ids is not None and not _whole(some['id']).equals(ids.filter(_mask(stays)))):
            raise UserError(
                'is not of the documents in ledger/', where=str(self._path), fix='Run prepare_data again, to its end.'
            )
        places = self._pyarrow.array(np.cumsum(stays) - 1, mask=~stays)
        return some['rule'], _whole(some['representative'].take(places)), some['kept_characters'].to_numpy()


def _mask(which: np.ndarray) -> Any:
    import pyarrow

    return pyarrow.array(which)


def _codes(column: Any, numbers: dict[str, int]) -> np.ndarray:
    """int64 [D]: the number of each name, len(numbers) of null."""
    encoded = _whole(column).dictionary_encode()
    table = np.array([numbers[name] for name in encoded.dictionary.to_pylist()] + [len(numbers)])
    return table[encoded.indices.fill_null(len(table) - 1).to_numpy(zero_copy_only=False)]


def _whole(column: Any) -> Any:
    return column.combine_chunks() if hasattr(column, 'combine_chunks') else column


def _booleans(column: Any) -> np.ndarray:
    result: np.ndarray = column.fill_null(True).to_numpy(zero_copy_only=False)
    return result


def _floats(column: Any) -> np.ndarray:
    result: np.ndarray = column.to_numpy(zero_copy_only=False)
    return result.astype(np.float32, copy=False)


def _stacked(columns: list[np.ndarray], dtype: Any, length: int) -> np.ndarray:
    return np.stack(columns) if columns else np.zeros((0, length), dtype)


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f'cannot be read ({error})', where=str(path), fix='Run prepare_data again.') from error
    return content if isinstance(content, dict) else None
