"""Sources of documents, whole and damaged: every record is a document, or counted with its reason."""

import bz2
import dataclasses
import errno
import gzip
import json
import os
import re
import tracemalloc
import zlib

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from llm.data.documents.document import Document, Ignored, Quarantined
from llm.data.documents.sources import Code, HtmlFiles, JsonLines, Parquet, PlainTexts, Synthetic, Warc, Wikipedia
from llm.data.sources.files import unreadable
from llm.errors import UserError
from tests.data import failing_store
from tests.data.failing_store import FailingStore


def read(source):
    return [item for shard in source.shards() for item in shard.read()]


def reasons(items):
    return [item.reason for item in items if isinstance(item, Quarantined)]


def texts(items):
    return [item.text for item in items if isinstance(item, Document)]


def warc(*pages, lengths=(), headers=()):
    """A web archive of responses; `lengths` by index are false ones, `headers` by index other lines of HTTP's."""
    lengths, headers, records = dict(lengths), dict(headers), []
    for i, page in enumerate(pages):
        lines = headers.get(i, 'Content-Type: text/html').encode()
        body = b'HTTP/1.1 200 OK\r\n' + lines + b'\r\n\r\n' + page
        head = (
            f'WARC/1.0\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:{i}>\r\nWARC-Target-URI: http://EXAMPLE.org:80/{i}\r\n'
            f'WARC-Date: 2024-01-02T03:04:05Z\r\nContent-Type: application/http; msgtype=response\r\n'
            f'Content-Length: {lengths.get(i, len(body))}\r\n\r\n'
        )
        records.append(head.encode() + body + b'\r\n\r\n')
    return records


PAGES = [f'<p>This is page number {i}, with some words on it.</p>'.encode() for i in range(5)]


def test_real_web_archives(dev_data):
    items = read(Warc(files=str(dev_data / 'web' / 'warc' / '*.warc.gz'), name='crawl'))
    documents = [item for item in items if isinstance(item, Document)]
    # As `zgrep -a ^WARC-Type` and `zgrep -a ^HTTP/1.1` count them; four plain texts are the crawler's own logs.
    assert len(documents) == 37 + 4
    assert sum(item == Ignored('request record') for item in items) == 37
    assert sum(isinstance(item, Ignored) for item in items) == 41
    first = documents[0]
    assert (first.id, first.domain) == ('urn:uuid:283E41D7-F686-4C3E-B7DA-E8D248A100C1', 'www.semanticscholar.org')
    assert (first.date, first.text) == ('2024-04-25T16:24:44+00:00', '')
    # Sent in chunks: their lengths are not part of the page.
    assert all(document.markup.lstrip().startswith('<') for document in documents if document.markup)


RECORD = len(warc(*PAGES)[2])


# The last ones end where the next record but one begins, or a little after.
@pytest.mark.parametrize('length', [10, 100_000, 10**25, 96 + 151, 96 + RECORD, 97 + RECORD, 96 + 2 * RECORD])
def test_a_record_of_false_length_is_quarantined_alone(tmp_path, length):
    (tmp_path / 'a.warc').write_bytes(b''.join(warc(*PAGES, lengths={1: length})))
    items = read(Warc(files=str(tmp_path / 'a.warc'), name='a'))
    assert [item.id for item in items if isinstance(item, Document)] == ['urn:0', 'urn:2', 'urn:3', 'urn:4']
    (bad,) = [item for item in items if isinstance(item, Quarantined)]
    assert 'false length' in bad.reason


def deflated(data, wbits):
    packer = zlib.compressobj(wbits=wbits)
    return packer.compress(data) + packer.flush()


PAGE = '<p>Grüße – schön</p>'
PACKED = {
    'Content-Encoding: gzip': gzip.compress(PAGE.encode()[:9]) + gzip.compress(PAGE.encode()[9:]),
    'Content-Encoding: deflate': deflated(PAGE.encode(), 15),
    'content-encoding: Deflate': deflated(PAGE.encode(), -15),
    'Content-Encoding: br': bytes.fromhex('0b0c80') + PAGE.encode() + b'\3',  # as it is, in a frame of Brotli's
    'Content-Encoding: zstd': zstandard.compress(PAGE.encode()),
    'Content-Encoding: deflate, gzip': gzip.compress(zlib.compress(PAGE.encode())),
    'Transfer-Encoding: chunked\r\nContent-Encoding: gzip': b'%x\r\n%s\r\n0\r\n\r\n'
    % (len(gzip.compress(PAGE.encode())), gzip.compress(PAGE.encode())),
    # Unpacked by the crawler, which left the header.
    'Content-Encoding:  gzip': PAGE.encode(),
    'Transfer-Encoding: chunked': PAGE.encode(),
}


@pytest.mark.parametrize(('name', 'packing'), [('a.warc', bytes), ('a.warc.gz', gzip.compress)])
def test_what_a_server_packed_wrongly_costs_no_other_page(tmp_path, name, packing):
    """A page that could not be unpacked took the page before it along, and at times all behind it."""
    broken = {'Content-Encoding: x-own': PAGE.encode(), 'Content-Encoding: br ': b'zzzz'}
    headers = [line for good in PACKED for line in (good, *broken)]
    records = warc(
        *((PACKED | broken)[line] for line in headers),
        headers={i: f'Content-Type: Text/HTML; charset=utf-8\r\n{line}' for i, line in enumerate(headers)},
    )
    (tmp_path / name).write_bytes(b''.join(map(packing, records)))
    items = list(read(Warc(name='w', files=f'{tmp_path}/{name}')))
    assert len(items) == len(headers)
    for line, item in zip(headers, items, strict=True):
        if line in broken:
            assert 'cannot be decoded' in item.reason and item.id
        else:
            assert item.markup == PAGE, line


def test_a_page_about_web_archives_is_a_page(tmp_path):
    pages = [b'<pre>a record:\r\n\r\n' + warc(PAGES[0])[0] + b'</pre> and more', b'\r\n\r\nWARC/1.', *PAGES[2:]]
    (tmp_path / 'a.warc').write_bytes(b''.join(warc(*pages)))
    items = read(Warc(files=str(tmp_path / 'a.warc'), name='a'))
    assert [item.id for item in items] == [f'urn:{i}' for i in range(5)]
    assert items[0].markup.endswith('and more')


def test_a_truncated_archive_gives_what_came_before(tmp_path):
    members = [gzip.compress(record) for record in warc(*PAGES)]
    data = b''.join(members)
    (tmp_path / 'a.warc.gz').write_bytes(data[: len(data) - len(members[-1]) // 2])
    items = read(Warc(files=str(tmp_path / 'a.warc.gz'), name='a'))
    assert [item.id for item in items if isinstance(item, Document)] == ['urn:0', 'urn:1', 'urn:2', 'urn:3']
    (reason,) = reasons(items)
    assert 'compressed data ends early' in reason
    # And a record before it covers all that is left.
    for length in (10_000, 10**9):
        members = [gzip.compress(record) for record in warc(*PAGES, lengths={1: length})]
        (tmp_path / 'a.warc.gz').write_bytes(b''.join(members)[:-20])
        items = read(Warc(files=str(tmp_path / 'a.warc.gz'), name='a'))
        assert [item.id for item in items if isinstance(item, Document)] == ['urn:0', 'urn:2', 'urn:3']
        assert len(reasons(items)) == 2


def test_what_is_too_long_is_never_held(tmp_path):
    limit = 1 << 20
    bomb = b'<p>' + b'a' * (64 << 20)
    (tmp_path / 'a.html.gz').write_bytes(gzip.compress(bomb, 9))
    (tmp_path / 'b.html.zst').write_bytes(zstandard.compress(bomb))
    (tmp_path / 'c.html.bz2').write_bytes(bz2.compress(bomb))
    line = json.dumps({'text': 'a' * (64 << 20)}).encode()
    (tmp_path / 'd.jsonl.gz').write_bytes(gzip.compress(b'{"text": "x"}\n' + line + b'\n{"text": "y"}', 1))
    (tmp_path / 'e.warc.gz').write_bytes(gzip.compress(b''.join(warc(PAGES[0], bomb, PAGES[1])), 1))
    del bomb, line
    tracemalloc.start()
    pages = read(HtmlFiles(files=str(tmp_path / '*.html.*'), name='pages', max_document_bytes=limit))
    lines = read(JsonLines(files=str(tmp_path / 'd.jsonl.gz'), name='lines', max_document_bytes=limit))
    archive = read(Warc(files=str(tmp_path / 'e.warc.gz'), name='archive', max_document_bytes=limit))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [bool(re.match(r'67,108,867 bytes, more than', reason)) for reason in reasons(pages)] == [True] * 3
    assert (texts(lines), len(reasons(lines))) == (['x', 'y'], 1)
    assert ([item.id for item in archive if isinstance(item, Document)], len(reasons(archive))) == (
        ['urn:0', 'urn:2'],
        1,
    )
    assert peak < 64 << 20


def test_json_lines(tmp_path):
    records = [
        '{"text": "one", "id": 7, "url": "https://A.example/x", "date": "2020", "license": "MIT", "score": [1]}',
        '',
        'not JSON',
        '[1]',
        '{"words": "two"}',
        '{"text": 3}',
        '{"text": "half \\ud800 pair \\ud83d\\ude00"}',
        '{"id": 7, "text": "again"}',
        '{"text": ""}',
    ]
    (tmp_path / 'a.jsonl').write_text('\n'.join(records))
    (tmp_path / 'b.jsonl.gz').write_bytes(gzip.compress(b'{"text": "three"}\n')[:-10])
    items = read(JsonLines(files=str(tmp_path / '*'), name='s', licence='CC0-1.0'))
    documents = [item for item in items if isinstance(item, Document)]
    assert documents[0] == Document(
        '7', 'one', 's', 'https://A.example/x', 'a.example', '2020', 'MIT', metadata={'score': [1]}
    )
    assert [document.text for document in documents[1:]] == ['half \ufffd pair \U0001f600', '']
    assert documents[1].metadata == {'lone_surrogates': True}
    assert (documents[1].id, documents[1].licence) == (f's:{tmp_path}/a.jsonl:7', 'CC0-1.0')
    assert [reason[:20] for reason in reasons(items)] == [
        'not a line of JSON (', 'a JSON list, not an ', "has no field 'text';", "field 'text' holds i",
        'its id has come up b', 'compressed data ends',
    ]  # fmt: skip


def test_parquet(tmp_path):
    table = pyarrow.table({'content': ['a', None, 'c'], 'id': [1, 2, 3], 'when': [b'x', b'y', b'z']})
    pyarrow.parquet.write_table(table, tmp_path / 'a.parquet')
    items = read(Parquet(files=f'file://{tmp_path}/*.parquet', name='p', text_field='content'))
    assert [(item.id, item.text, item.metadata['when']) for item in items if isinstance(item, Document)] == [
        ('1', 'a', "b'x'"), ('3', 'c', "b'z'"),
    ]  # fmt: skip
    assert reasons(items) == ["field 'content' holds NoneType, not a string"]
    data = (tmp_path / 'a.parquet').read_bytes()
    (tmp_path / 'a.parquet').write_bytes(data[:-20])
    (reason,) = reasons(read(Parquet(files=str(tmp_path / 'a.parquet'), name='p')))
    assert reason.startswith('Parquet data is corrupt or cut short after row 0')


@pytest.mark.parametrize(
    ('data', 'text'),
    [
        ('grün'.encode(), 'grün'),
        ('\ufeffgrün'.encode(), 'grün'),
        ('Der Himmel ist schön, und die Wiesen sind grün. Über allem weht ein Wind.'.encode('cp1252'), None),
        ('Съешь же ещё этих мягких французских булок, да выпей чаю.'.encode('windows-1251'), None),
        (b'text mit null\0 und mehr', 'text mit null\0 und mehr'),
    ],
)
def test_encodings_are_found(tmp_path, data, text):
    (tmp_path / 'a.txt').write_bytes(data)
    (found,) = texts(read(PlainTexts(files=str(tmp_path / 'a.txt'), name='t')))
    expected = text or (data.decode('cp1252') if b'Himmel' in data else data.decode('windows-1251'))
    assert found == expected


@pytest.mark.parametrize(
    ('label', 'data', 'text'),
    [
        ('; charset=ISO-8859-1', '“a” – ü'.encode('cp1252'), '“a” – ü'),
        ('; charset=gb2312', '囍 – 中'.encode('gbk'), '囍 – 中'),
        ('; charset=ISO-8859-1', '\ufeffGrüße'.encode(), 'Grüße'),
        ('', '\ufeffGrüße'.encode('utf-16-le'), 'Grüße'),
        ('', '<meta charset=iso-2022-jp>日本語'.encode('iso-2022-jp'), '<meta charset=iso-2022-jp>日本語'),
    ],
)
def test_encodings_of_pages_are_those_of_browsers(tmp_path, label, data, text):
    (tmp_path / 'a.warc').write_bytes(b''.join(warc(data, headers={0: f'Content-Type: text/html{label}'})))
    assert [item.markup for item in read(Warc(name='w', files=f'{tmp_path}/a.warc'))] == [text]


def test_a_book_loses_its_frame(tmp_path):
    frame = (
        'Title\n*** START OF THE PROJECT GUTENBERG EBOOK EMMA ***\nChapter 1\n*** END OF THE PROJECT GUTENBERG EBOOK'
    )
    (tmp_path / 'a.txt').write_text(frame)
    assert texts(read(PlainTexts(files=str(tmp_path / 'a.txt'), name='t'))) == ['\nChapter 1\n']


DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/">
<siteinfo><base>https://en.wikipedia.org/wiki/Main_Page</base></siteinfo>
<page><title>Horse shoe</title><ns>0</ns><id>12</id><revision><id>5</id><timestamp>2024-01-01T00:00:00Z</timestamp>
<text>{{Infobox|a=b}}A '''shoe''' for [[horse|horses]].&lt;ref&gt;Book&lt;/ref&gt; [[File:x.jpg|thumb|Of [[iron]]]]
== History ==
It is old.
{| class="wikitable"
| a || b
|}
== References ==
&lt;references/&gt;
=== Printed ===
hidden
== Uses ==
Luck.[[Category:Shoes]]</text></revision></page>
<page><title>R</title><ns>0</ns><id>13</id><redirect title="x"/></page>
<page><title>Talk:x</title><ns>1</ns><id>14</id></page></mediawiki>"""


def test_a_dump_of_wikipedia(tmp_path):
    (tmp_path / 'a.xml.bz2').write_bytes(bz2.compress(DUMP.encode()))
    page, *others = read(Wikipedia(files=str(tmp_path / 'a.xml.bz2'), name='w'))
    assert re.sub(r'\s+', ' ', page.text) == 'Horse shoe A shoe for horses. History It is old. Uses Luck.'
    assert (page.id, page.url, page.licence) == ('w:12', 'https://en.wikipedia.org/wiki/Horse_shoe', 'CC-BY-SA-4.0')
    assert others == [Ignored('redirect'), Ignored('page of namespace 1')]

    (tmp_path / 'a.xml.bz2').write_bytes(bz2.compress((DUMP[: DUMP.index('</mediawiki>')] + 'word ' * 10_000).encode()))
    items = read(Wikipedia(files=str(tmp_path / 'a.xml.bz2'), name='w'))
    assert (items[0], reasons(items)[0][:36]) == (page, 'is no XML, or is cut short, after pa')
    entities = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><mediawiki>&b;</mediawiki>'
    (tmp_path / 'a.xml.bz2').write_bytes(bz2.compress(entities.encode()))
    assert 'EntitiesForbidden' in reasons(read(Wikipedia(files=str(tmp_path / 'a.xml.bz2'), name='w')))[0]


def test_code_has_its_language_and_the_nearest_licence(tmp_path, request):
    licence = (request.config.rootpath / 'LICENSE').read_text()
    for name, content in {
        'LICENSE': licence, 'a.py': 'x = 1\n', 'run': '#!/usr/bin/env bash\n', 'b.bin': '\0\1', 'c.txt': 'text',
        'deep/er/a.rs': 'fn main() {}\n', 'mit/b.py': '# SPDX-License-Identifier: MIT\n', '.git/x.py': 'y',
    }.items():  # fmt: skip
        path = tmp_path / 'repo' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / 'repo' / 'run').chmod(0o755)
    (tmp_path / 'repo' / 'link.py').symlink_to('a.py')
    os.mkfifo(tmp_path / 'repo' / 'pipe.py')  # which no one writes to
    items = read(Code(files=str(tmp_path / '*'), name='c', languages=('python', 'rust', 'bash')))
    documents = [item for item in items if isinstance(item, Document)]
    assert {(d.metadata['path'], d.metadata['programming_language'], d.licence) for d in documents} == {
        ('a.py', 'python', 'Apache-2.0'), ('run', 'bash', 'Apache-2.0'), ('deep/er/a.rs', 'rust', 'Apache-2.0'),
        ('mit/b.py', 'python', 'MIT'),
    }  # fmt: skip
    other = tmp_path / 'other' / 'repo'
    other.mkdir(parents=True)
    (other / 'a.py').write_text('x = 2\n')
    both = read(Code(files=(f'{tmp_path}/repo', f'{tmp_path}/other/*'), name='c', languages=('python',)))
    ids = [item.id for item in both if isinstance(item, Document)]
    assert len(set(ids)) == len(ids) == 3  # a repository's name is not unique
    with pytest.raises(UserError, match='lies within .* read twice'):
        Code(files=f'{tmp_path}/**', name='c').shards()
    with pytest.raises(UserError, match='no directory matches'):
        Code(files=str(tmp_path / 'none*'), name='c').shards()


@pytest.mark.parametrize('kind', ['arithmetic', 'sorting', 'recall'])
def test_generated_documents_depend_on_their_index_alone(kind):
    few, many = (
        read(Synthetic(name='s', count=20, kind=kind, shard_documents=size)) for size in (3, 100)
    )  # fmt: skip
    assert few == many
    assert len({document.text for document in many}) == 20
    for document in many:
        if kind == 'arithmetic':
            for line in document.text.splitlines():
                left, _, right = line.partition(' = ')
                assert eval(left) == int(right)
        elif kind == 'sorting':
            numbers, ordered = (line.partition(': ')[2].split(', ') for line in document.text.splitlines())
            assert sorted(numbers, key=int) == ordered
        else:
            name, thing, count = re.search(r'How many (\w+) does (\w+) have\? (\d+)', document.text).group(2, 1, 3)
            assert f'{name} has {count} {thing}.' in document.text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failing(JsonLines):
    """Its disk fails after the first record."""

    def read(self, path):
        yield next(super().read(path))
        raise unreadable(path, OSError(errno.EIO, 'Input/output error'))


def test_a_file_that_cannot_be_read_stops_the_run(tmp_path):
    """And is not taken for one with damaged content, which would be done for good."""
    for source, suffix in ((JsonLines, 'jsonl'), (Warc, 'warc'), (Parquet, 'parquet'), (Wikipedia, 'xml.bz2')):
        for path in (f'{tmp_path}/a.{suffix}', f'memory://{tmp_path}/a.{suffix}'):  # where errors have no number
            with fsspec.open(path, 'wb') as file:
                file.write(b'{"text": "x"}')
            (shard,) = source(files=path, name='s').shards()
            files, inner = fsspec.core.url_to_fs(path)
            files.rm(inner)
            with pytest.raises(UserError, match='cannot be read'):
                list(shard.read())
    (tmp_path / 'a.jsonl').write_text('{"text": "x"}\n{"text": "y"}')
    (shard,) = Failing(files=str(tmp_path / 'a.jsonl'), name='s').shards()
    with pytest.raises(UserError, match='cannot be read'):
        list(shard.read())
    failing_store.register()
    pyarrow.parquet.write_table(pyarrow.table({'text': ['x'] * 9}), 'failing://a.parquet', filesystem=FailingStore())
    (shard,) = Parquet(files='failing://a.parquet', name='s').shards()
    with pytest.raises(UserError, match="cannot be read .KeyError: 'connection'"):
        list(shard.read())
    with pytest.raises(UserError, match=r'is a directory\. Give a glob: .*/\*\.jsonl'):
        JsonLines(files=str(tmp_path), name='s').shards()
    with pytest.raises(UserError, match='a kind that is not read'):
        JsonLines(files=__file__, name='s').shards()
