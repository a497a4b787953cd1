"""Reading labelled examples: JSON lines, CSV and TSV with a header, and CoNLL files of tagged words."""

import csv
import dataclasses
import io
import json
import string
from collections.abc import Iterator
from typing import Any, Literal

from llm.data.sources.files import find_files, split_stream, stream_bytes
from llm.errors import UserError

# What a label is: one of several classes, a number, a tag for each word, or a text that answers. Pairs of texts for an
# embedding have none, or in evaluation how alike they are, a number.
Task = Literal['classification', 'regression', 'tagging', 'generation', 'embedding']

_TABLES = {'.csv': ',', '.tsv': '\t'}
_TAGGED = ('.conll', '.conllu', '.iob')
_PACKINGS = ('', '.gz', '.zst')
_SUFFIXES = tuple(kind + packing for kind in ('.jsonl', '.json', *_TABLES, *_TAGGED) for packing in _PACKINGS)


@dataclasses.dataclass(frozen=True)
class LabelledFiles:
    """Which files, and where in a record the text and the label are.

    Templates are Python's: '{question}' is the field of that name, 'Question: {question}' puts words before it.

    Attributes:
        files: glob or globs of .jsonl and .json (an object a line), .csv and .tsv (with a header), and for tagging
            .conll and .iob (a word a line, its tag in the last column, sentences apart by blank lines) and .conllu;
            each also as .gz and .zst.
        text: template of the text.
        second_text: template of the other text of a pair; None where there is none.
        label: template of the label; None where there is none, as of pairs.
        negative: template of a text that does not belong to the first, for embeddings; None where there is none.
    """

    files: str | tuple[str, ...]
    text: str = '{text}'
    second_text: str | None = None
    label: str | None = '{label}'
    negative: str | None = None


@dataclasses.dataclass(frozen=True)
class LabelledExample:
    """One example.

    Attributes:
        texts: one or two, for embeddings up to three; of tagged words, each word.
        label: as text; a tag for each word where words are tagged; '' where there is none.
        where: file and line.
    """

    texts: tuple[str, ...]
    label: str | tuple[str, ...]
    where: str


def read_labelled(config: LabelledFiles, task: Task) -> list[LabelledExample]:
    """All examples of the files, in order.

    Raises:
        UserError: a file or a record cannot be read, or the files hold no example; it says which.
    """
    _check_templates(config, task)
    found: list[LabelledExample] = []
    for path in find_files(config.files, _SUFFIXES):
        kind = path.removesuffix('.gz').removesuffix('.zst')
        if (task == 'tagging') != kind.endswith(_TAGGED):
            raise UserError(
                f'this kind of file does not hold examples for {task}',
                where=path,
                fix=f'Tags are read from {", ".join(_TAGGED)}, everything else from .jsonl, .json, .csv and .tsv.',
            )
        if task == 'tagging':
            found += _tagged(path, universal=kind.endswith('.conllu'))
        else:
            records = _json_records(path) if kind.endswith(('.jsonl', '.json')) else _table(path, _TABLES[kind[-4:]])
            found += [_example(config, record, where, task) for record, where in records]
    if not found:
        raise UserError('the files hold no example', where=str(config.files), fix='Check the globs.')
    return found


def _check_templates(config: LabelledFiles, task: Task) -> None:
    if config.label is None and task != 'embedding':
        raise UserError(f'{task} needs labels', where='LabelledFiles.label', fix="Name their field, as '{label}'.")
    if config.negative is not None and (task != 'embedding' or config.second_text is None):
        raise UserError(
            'a negative is for an embedding of pairs',
            where='LabelledFiles.negative',
            fix='Set second_text too, or negative = None.',
        )


def _lines(path: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(split_stream(stream_bytes(path), b'\n'), start=1):
        try:
            yield number, line.decode().removesuffix('\r')
        except UnicodeDecodeError as error:
            raise UserError('is not UTF-8', where=f'{path}:{number}', fix='Convert the file to UTF-8.') from error


def _json_records(path: str) -> Iterator[tuple[dict[str, Any], str]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f'{path}:{number}'
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f'is not JSON: {error}', where=where, fix='Each line is one object.') from error
        if not isinstance(record, dict):
            raise UserError('is not a JSON object', where=where, fix='Each line is one object.')
        yield record, where


def _table(path: str, delimiter: str) -> Iterator[tuple[dict[str, Any], str]]:
    text = io.StringIO(''.join(f'{line}\n' for _, line in _lines(path)))
    # Tab-separated files of this field have bare quotation marks in their texts.
    quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == '\t' else csv.QUOTE_MINIMAL
    reader = csv.DictReader(text, delimiter=delimiter, quoting=quoting, strict=True)
    try:
        for record in reader:
            where = f'{path}:{reader.line_num}'
            if None in record or None in record.values():
                wanted = len(reader.fieldnames or ())
                raise UserError(f'has not the {wanted} columns of the header', where=where, fix='Check the line.')
            yield record, where
    except csv.Error as error:
        raise UserError(f'cannot be read: {error}', where=f'{path}:{reader.line_num}', fix='Check it.') from error


class _Fields(string.Formatter):
    """Templates that read fields of a record only: no attributes, no indices."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        value = kwargs[field_name]
        if not isinstance(value, str | int | float) or value is None:
            raise TypeError(field_name)
        return value, field_name


_FIELDS = _Fields()


def _example(config: LabelledFiles, record: dict[str, Any], where: str, task: Task) -> LabelledExample:
    def filled(template: str) -> str:
        try:
            return _FIELDS.vformat(template, (), record)
        except KeyError as error:
            raise UserError(
                f'the template {template!r} reads {error.args[0]!r}, which the record does not have',
                where=where,
                fix=f'It has {", ".join(map(str, record))}; set LabelledFiles.text and LabelledFiles.label.',
            ) from error
        except TypeError as error:
            raise UserError(f'the field {error} is neither text nor a number', where=where, fix='Check it.') from error
        except ValueError as error:
            raise UserError(
                f'the template {template!r} is wrong: {error}', where='LabelledFiles', fix="Write fields as '{name}'."
            ) from error

    templates = (config.text, config.second_text, config.negative)
    texts = tuple(filled(template) for template in templates if template is not None)
    label = '' if config.label is None else filled(config.label)
    if config.label is not None and not label and task != 'generation':
        raise UserError('the label is empty', where=where, fix='Leave the record out, or complete it.')
    return LabelledExample(texts, label, where)


def _tagged(path: str, *, universal: bool) -> Iterator[LabelledExample]:
    """Sentences of a CoNLL file; of a CoNLL-U file (`universal`) the words and their parts of speech (UPOS)."""
    words: list[str] = []
    tags: list[str] = []
    begin = 1
    for number, line in [*_lines(path), (0, '')]:
        if line.strip() and not line.startswith('-DOCSTART-'):
            if universal and line.startswith('#'):
                continue
            columns = line.split('\t') if universal else line.split()
            if len(columns) < (10 if universal else 2):
                raise UserError(
                    f'has {len(columns)} columns', where=f'{path}:{number}', fix='Each line is a word and its tag.'
                )
            if universal and not columns[0].isdecimal():  # 1-2 is a contraction, 1.1 a word that is not there
                continue
            begin = begin if words else number
            words.append(columns[1] if universal else columns[0])
            tags.append(columns[3] if universal else columns[-1])
        elif words:
            yield LabelledExample(tuple(words), tuple(tags), f'{path}:{begin}')
            words, tags = [], []
