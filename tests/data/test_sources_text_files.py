"""Documents from text, JSON lines and parquet files."""

import gzip
import json
import pickle
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from llm.data.sources import ReadCounts, TextFiles, read_documents
from llm.errors import UserError

TEXTS = [f'Document {i}: Ärger im 🦙-Stall.\r\n{"x" * (i % 7)}\n' for i in range(200)]
JSON_SUFFIXES = ['.jsonl', '.jsonl.gz', '.jsonl.zst', '.json.gz']


def pack(path, data: bytes):
    packing = {'.gz': lambda data: gzip.compress(data, 1), '.zst': zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(packing(data))
    return str(path)


def write_json_lines(path, texts, field='text'):
    return pack(path, '\n'.join(json.dumps({'id': i, field: text}) for i, text in enumerate(texts)).encode())


def write_parquet(path, texts, field='text', kind=None, **options):
    table = pyarrow.table({'id': list(range(len(texts))), field: pyarrow.array(texts, kind or pyarrow.string())})
    pyarrow.parquet.write_table(table, path, **options)
    return str(path)


def read(source, split='train'):
    counts = ReadCounts()
    return list(read_documents(source, split, counts)), counts


@pytest.mark.parametrize('suffix', JSON_SUFFIXES)
def test_json_lines_of_every_packing(tmp_path, suffix):
    documents, counts = read(TextFiles(write_json_lines(tmp_path / f'a{suffix}', TEXTS), validation_fraction=0))
    assert documents == TEXTS
    assert (counts.documents, counts.bytes) == (200, sum(len(text.encode()) for text in TEXTS))


@pytest.mark.parametrize('suffix', ['.txt', '.txt.gz', '.txt.zst'])
def test_a_text_file_is_a_document_or_is_separated(tmp_path, suffix):
    path = pack(tmp_path / f'a{suffix}', '<|end|>'.join(TEXTS).encode())
    whole, _ = read(TextFiles(path, validation_fraction=0))
    assert whole == ['<|end|>'.join(TEXTS)]
    assert read(TextFiles(path, validation_fraction=0, document_separator='<|end|>'))[0] == TEXTS


@pytest.mark.parametrize(
    'kind',
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.binary(),
        pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ],
    ids=str,
)
def test_parquet_of_every_string_type(tmp_path, kind):
    path = write_parquet(tmp_path / 'a.parquet', TEXTS, 'body', kind, row_group_size=64)
    assert read(TextFiles(path, text_field='body', validation_fraction=0))[0] == TEXTS


def test_the_split_follows_the_content_whatever_file_it_stands_in(tmp_path):
    together = write_json_lines(tmp_path / 'together.jsonl', TEXTS)
    write_json_lines(tmp_path / 'part1.jsonl.gz', TEXTS[100:])
    write_parquet(tmp_path / 'part2.parquet', TEXTS[:100])
    settings = {'validation_fraction': 0.2}
    train, counts = read(TextFiles(together, **settings), 'train')
    validation, _ = read(TextFiles(together, **settings), 'validation')
    assert sorted(train + validation) == sorted(TEXTS)
    assert len(validation) == 34  # of 200; a binomial of mean 40 and deviation 6
    assert counts.other_split == 34
    for split, expected in (('train', train), ('validation', validation)):
        assert sorted(read(TextFiles(str(tmp_path / 'part*'), **settings), split)[0]) == sorted(expected)
    resplit, _ = read(TextFiles(together, split_salt=1, **settings), 'validation')
    assert set(resplit) != set(validation)
    larger, _ = read(TextFiles(together, validation_fraction=0.4), 'validation')
    assert set(larger) > set(validation)


def test_validation_files_are_the_validation_split_and_are_not_trained_on(tmp_path):
    write_json_lines(tmp_path / 'a.jsonl', TEXTS[:150])
    write_json_lines(tmp_path / 'held_out.jsonl', TEXTS[150:])
    source = TextFiles(str(tmp_path / '*.jsonl'), validation_files=str(tmp_path / 'held*'))
    assert read(source, 'train')[0] == TEXTS[:150]
    assert read(source, 'validation')[0] == TEXTS[150:]
    with pytest.raises(UserError, match='every file is one of validation_files'):
        TextFiles(str(tmp_path / 'held*'), validation_files=str(tmp_path / '*')).shards('train')


def test_a_long_text_is_cut_into_documents_that_joined_are_the_text(tmp_path):
    text = ''.join(f'Paragraph {i}, {"words " * (i % 50)}\n\n' for i in range(20_000))
    path = pack(tmp_path / 'a.txt', text.encode())
    whole, _ = read(TextFiles(path, validation_fraction=0))
    assert ''.join(whole) == text
    assert [len(document) >= 2**20 for document in whole] == [True, True, True, False]
    train, counts = read(TextFiles(path, validation_fraction=0.05), 'train')
    validation, _ = read(TextFiles(path, validation_fraction=0.05), 'validation')
    assert counts.other_split == len(validation)
    assert sum(map(len, train)) + sum(map(len, validation)) == len(text)
    assert 0.03 < sum(map(len, validation)) / len(text) < 0.07
    assert all(document in text and document.endswith('\n\n') for document in train + validation)
    for suffix in ('.txt.gz', '.txt.zst'):
        packed = pack(tmp_path / f'b{suffix}', text.encode())
        assert read(TextFiles(packed, validation_fraction=0.05), 'train')[0] == train


@pytest.mark.parametrize('name', ['tinyshakespeare.txt.gz', 'wikitext2_*.txt.gz', 'classic_books.jsonl.zst'])
def test_one_binding_is_enough_for_real_files(dev_data, name):
    source = TextFiles(str(dev_data / 'text' / name))
    _, train = read(source, 'train')
    _, validation = read(source, 'validation')
    assert 0.004 < validation.bytes / (train.bytes + validation.bytes) < 0.03
    assert train.invalid_utf8 == train.skipped == validation.skipped == 0


def test_empty_documents_are_counted_and_left_out(tmp_path):
    documents, counts = read(
        TextFiles(write_json_lines(tmp_path / 'a.jsonl', ['', 'a', ' \n\t', 'b']), validation_fraction=0)
    )
    assert (documents, counts.empty) == (['a', 'b'], 2)
    (tmp_path / 'empty.txt').touch()
    with pytest.raises(
        UserError, match=r'empty\.txt: the train split has no documents .* 1 are empty, .*Give files with text'
    ):
        read(TextFiles(str(tmp_path / 'empty.txt')))


def test_bad_json_is_counted_sampled_and_skipped(tmp_path):
    lines = [
        '{"text": "good"}',
        '',
        '{"text": "cut sho',
        '["text"]',
        '{"body": "x", "id": 1}',
        '{"text": null}',
        '{"text": 12}',
        '[' * 100_000,
        '{"text": ' + '1' * 5000 + '}',
        '{"text": "also good"}',
    ]
    path = pack(tmp_path / 'a.jsonl', '\n'.join(lines).encode())
    documents, counts = read(TextFiles(path, validation_fraction=0))
    assert documents == ['good', 'also good']
    assert [(sample.file, sample.record) for sample in counts.samples] == [(path, n) for n in (3, 4, 5, 6, 7, 8, 9)]
    reasons = [sample.reason for sample in counts.samples]
    assert reasons[0].startswith('not a line of JSON (Unterminated string')
    assert reasons[1:5] == [
        'a JSON list, not an object',
        "no field 'text' (text_field); it has 'body', 'id'",
        "field 'text' is null, not a string",
        "field 'text' is 12, not a string",
    ]
    with pytest.raises(UserError, match=rf'{path}:5: no field .*; 3 bad records, more than max_bad_records = 2'):
        read(TextFiles(path, validation_fraction=0, max_bad_records=2))


def test_a_parquet_file_without_the_column_or_with_nulls(tmp_path):
    path = write_parquet(tmp_path / 'a.parquet', ['a', None, 'b'])
    documents, counts = read(TextFiles(path, validation_fraction=0))
    assert (documents, counts.skipped, counts.samples[0].record) == (['a', 'b'], 1, 2)
    with pytest.raises(UserError, match=r"a\.parquet: no column 'body'\. Set text_field to one of 'id', 'text'"):
        read(TextFiles(path, text_field='body'))
    with pytest.raises(UserError, match=r"a\.parquet: column 'id' holds int64, not strings"):
        read(TextFiles(path, text_field='id'))


def test_damaged_parquet_is_found(tmp_path):
    path = tmp_path / 'a.parquet'
    write_parquet(path, TEXTS, compression='zstd')
    content = path.read_bytes()
    for keep in (0, 3, 100, len(content) // 2, len(content) - 9, len(content) - 1):
        path.write_bytes(content[:keep])
        with pytest.raises(UserError, match=r'a\.parquet: parquet data is corrupt or cut short after row 0'):
            read(TextFiles(str(path), validation_fraction=0))
    path.write_bytes(content[:600] + b'\xff' * 200 + content[800:])
    with pytest.raises(UserError, match='parquet data is corrupt'):
        read(TextFiles(str(path), validation_fraction=0))


INVALID = b'caf\xe9 and more'


def write_invalid(tmp_path, suffix):
    """A file whose record 2 is not UTF-8."""
    path = tmp_path / f'a{suffix}'
    if suffix == '.parquet':
        return write_parquet(path, [b'one', INVALID, b'three'], kind=pyarrow.binary())
    if suffix == '.txt':
        return pack(path, b'<s>'.join([b'one', INVALID, b'three']))
    return pack(path, b'\n'.join(b'{"text": "' + text + b'"}' for text in (b'one', INVALID, b'three')))


@pytest.mark.parametrize('suffix', ['.txt', '.jsonl.zst', '.parquet'])
def test_invalid_utf8_is_replaced_skipped_or_stops(tmp_path, suffix):
    path = write_invalid(tmp_path, suffix)
    settings = {'validation_fraction': 0, 'document_separator': '<s>'}
    documents, counts = read(TextFiles(path, **settings))
    assert documents == ['one', 'caf\ufffd and more', 'three']
    assert (counts.invalid_utf8, counts.skipped, counts.samples[0].record) == (1, 0, 2)
    documents, counts = read(TextFiles(path, invalid_utf8='skip', **settings))
    assert documents == ['one', 'three']
    assert (counts.invalid_utf8, counts.skipped) == (1, 1)
    with pytest.raises(UserError, match=rf'{path}:2: invalid UTF-8 .*invalid_utf8'):
        read(TextFiles(path, invalid_utf8='stop', **settings))
    with pytest.raises(UserError, match='max_bad_records = 0'):
        read(TextFiles(path, invalid_utf8='skip', max_bad_records=0, **settings))


def test_a_lone_surrogate_spelt_in_json_is_invalid_utf8(tmp_path):
    path = pack(tmp_path / 'a.jsonl', rb'{"text": "a \ud83e\udd99 b \ud83e c"}')
    documents, counts = read(TextFiles(path, validation_fraction=0))
    assert (documents, counts.invalid_utf8) == (['a 🦙 b \ufffd c'], 1)


def test_invalid_bytes_in_a_long_text_name_the_line_of_their_piece(tmp_path):
    lines = [b'x' * 63] * 4000
    lines[2000] = b'\xff' * 63
    path = pack(tmp_path / 'a.txt', b'\n'.join(lines))
    documents, counts = read(TextFiles(path, validation_fraction=0))
    assert ''.join(documents).encode() == b'\n'.join(lines).replace(b'\xff', '\ufffd'.encode())
    assert counts.samples[0].record == 1985  # the piece of 32 lines that holds line 2001
    documents, counts = read(TextFiles(path, validation_fraction=0, invalid_utf8='skip'))
    assert counts.skipped == 1
    assert [len(document) for document in documents] == [1984 * 64, (4000 - 2016) * 64 - 1]


MEASURE = """
import resource, sys
from llm.data.sources import ReadCounts, TextFiles, read_documents
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
counts = ReadCounts()
longest = max(len(text) for text in read_documents(TextFiles(sys.argv[1], validation_fraction=0), 'train', counts))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(counts.bytes, longest, after - before)
"""


@pytest.mark.parametrize(('suffix', 'copies'), [('.txt', 0.5), ('.txt.zst', 1.5), ('.jsonl', 5), ('.jsonl.gz', 5)])
def test_a_document_of_100_mb_on_one_line(tmp_path, suffix, copies):
    size = 100_000_000
    line = b'word ' * (size // 5)
    data = line if suffix.startswith('.txt') else b'{"text": "' + line + b'"}\n'
    path = pack(tmp_path / f'a{suffix}', data)
    run = subprocess.run([sys.executable, '-c', MEASURE, path], capture_output=True, text=True, check=True)
    num_bytes, longest, kilobytes = map(int, run.stdout.split())
    assert num_bytes == size
    assert longest == (size if 'jsonl' in suffix else 512 * 2050)  # 512 pieces make a MiB
    assert kilobytes * 1024 < copies * size


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'validation_fraction': 1.0}, 'not in'),
        ({'validation_fraction': -0.1}, 'not in'),
        ({'document_separator': ''}, 'document_separator is empty'),
        ({'max_bad_records': -1}, 'negative'),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(UserError, match=message):
        TextFiles('*.txt', **settings)


def test_no_validation_split_is_said(tmp_path):
    path = write_json_lines(tmp_path / 'a.jsonl', TEXTS[:3])
    with pytest.raises(UserError, match='there is no validation split: validation_fraction is 0'):
        TextFiles(path, validation_fraction=0).shards('validation')
    with pytest.raises(UserError, match=r'the validation split has no documents \(3 belong to the other split'):
        read(TextFiles(path, validation_fraction=1e-9), 'validation')


def test_the_fingerprint_changes_with_content_and_settings_only(tmp_path):
    write_json_lines(tmp_path / 'a.jsonl', TEXTS)
    write_json_lines(tmp_path / 'same.jsonl', TEXTS)
    write_json_lines(tmp_path / 'other.jsonl', TEXTS[1:])

    def fingerprint(name='a.jsonl', split='train', **settings):
        (shard,) = TextFiles(str(tmp_path / name), **settings).shards(split)
        assert pickle.loads(pickle.dumps(shard)) == shard
        return shard.fingerprint()

    first = fingerprint()
    assert len(first) == 64
    assert fingerprint() == fingerprint('same.jsonl') == fingerprint(document_separator='x') == first
    changed = [
        fingerprint('other.jsonl'),
        fingerprint(split='validation'),
        fingerprint(text_field='body'),
        fingerprint(invalid_utf8='skip'),
        fingerprint(validation_fraction=0.5),
        fingerprint(split_salt=1),
        fingerprint(validation_files=str(tmp_path / 'other.jsonl')),
        fingerprint(fingerprint_by='modification_time'),
    ]
    assert len({first, *changed}) == 1 + len(changed)
    by_time = fingerprint(fingerprint_by='modification_time')
    write_json_lines(tmp_path / 'a.jsonl', TEXTS[:-1])
    assert fingerprint() != first
    assert fingerprint(fingerprint_by='modification_time') != by_time
