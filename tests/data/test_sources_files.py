"""Finding files, decompressing them and cutting streams into records."""

import gzip
import itertools
import os
import random

import fsspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from llm.data.sources.files import UnreadableFile, cut_stream, find_files, split_stream, stream_bytes
from llm.errors import UserError
from tests.data import failing_store


def chunked(data: bytes, cuts: list[int]):
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return (data[a:b] for a, b in itertools.pairwise(edges))


@given(st.text('ab\n'), st.lists(st.integers(0, 1000)), st.sampled_from(['\n', 'ab', 'aab', 'abab', '\n\n']))
def test_split_stream_equals_bytes_split_however_the_stream_is_chunked(text, cuts, separator):
    data = text.encode()
    expected = data.split(separator.encode())
    if not expected[-1]:
        expected.pop()
    assert list(split_stream(chunked(data, cuts), separator.encode())) == expected


@given(st.text(st.sampled_from('ab \né🦙')), st.lists(st.integers(0, 1000)), st.integers(4, 9))
def test_cut_stream_keeps_every_byte_and_every_character(text, cuts, length):
    data = text.encode()
    pieces = list(cut_stream(chunked(data, cuts), length))
    assert b''.join(pieces) == data
    assert ''.join(piece.decode() for piece in pieces) == text
    assert all(length - 3 <= len(piece) <= 2 * length for piece in pieces[:-1])
    assert pieces == list(cut_stream(iter([data]), length))


@given(st.binary(max_size=200))
def test_cut_stream_ends_on_bytes_that_are_no_utf8(data):
    assert b''.join(cut_stream(iter([data]), 4)) == data


def test_cut_stream_prefers_blank_lines_then_lines_then_spaces():
    assert list(cut_stream(iter([b'aa b\nc\n\nd e f g h']), 4)) == [b'aa b\nc\n\n', b'd e ', b'f g h']
    assert next(cut_stream(iter([b'aaaa b\nc d e f g']), 4)) == b'aaaa b\n'


@pytest.mark.parametrize('size', [0, 1, 3, 1000, 1_000_000])
def test_stream_bytes_gives_the_content_of_every_packing(tmp_path, size):
    content = random.Random(0).randbytes(size // 2).hex().encode()
    half = len(content) // 2
    packed = {
        'plain.txt': content,
        'one.txt.gz': gzip.compress(content),
        'members_and_padding.txt.gz': gzip.compress(content[:half]) + gzip.compress(content[half:]) + b'\0' * 512,
        'one.txt.zst': zstandard.compress(content),
        'frames.txt.zst': zstandard.compress(content[:half]) + zstandard.compress(content[half:]),
        'window.txt.zst': zstandard.ZstdCompressor(
            compression_params=zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
        ).compress(content),
    }
    for name, data in packed.items():
        (tmp_path / name).write_bytes(data)
        assert b''.join(stream_bytes(str(tmp_path / name))) == content, name


@pytest.mark.parametrize('suffix', ['.txt', '.txt.gz'])
def test_a_byte_order_mark_is_dropped(tmp_path, suffix):
    data = b'\xef\xbb\xbftext'
    path = tmp_path / f'marked{suffix}'
    path.write_bytes(gzip.compress(data) if suffix.endswith('.gz') else data)
    assert b''.join(stream_bytes(str(path))) == b'text'


@pytest.mark.parametrize('suffix', ['.gz', '.zst'])
def test_cut_short_or_damaged_anywhere_is_found(tmp_path, suffix):
    content = random.Random(0).randbytes(40_000).hex().encode()
    checked = zstandard.ZstdCompressor(write_checksum=True)
    packed = gzip.compress(content, mtime=0) if suffix == '.gz' else checked.compress(content)
    path = tmp_path / f'broken.txt{suffix}'
    for keep in [0, 1, 5, 11, *range(12, len(packed), 4999), len(packed) - 5, len(packed) - 1]:
        path.write_bytes(packed[:keep])
        with pytest.raises(UserError, match=rf'broken\.txt{suffix}: compressed data ends early, at byte {keep} '):
            list(stream_bytes(str(path)))
    for position in range(12, len(packed), 4999):
        flipped = bytearray(packed)
        flipped[position] ^= 0x10
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=r'compressed data (is corrupt after|ends early, at) byte'):
            list(stream_bytes(str(path)))
    path.write_bytes(packed + b'rubbish')
    with pytest.raises(UserError, match='compressed data'):
        list(stream_bytes(str(path)))


SUFFIXES = ('.txt', '.txt.gz')


def test_globs_are_sorted_and_files_taken_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'sub').mkdir()
    for name in ('b.txt', 'a.txt', 'sub/c.txt.gz', 'odd[1].txt'):
        (tmp_path / name).touch()
    os.symlink('a.txt', 'z.txt')
    assert find_files('*.txt', SUFFIXES) == ('a.txt', 'b.txt', 'odd[1].txt')
    assert find_files(('b.txt', '*.txt'), SUFFIXES) == ('a.txt', 'b.txt', 'odd[1].txt')
    assert find_files('**/*', SUFFIXES) == ('a.txt', 'b.txt', 'odd[1].txt', 'sub/c.txt.gz')
    assert find_files('odd[1].txt', SUFFIXES) == ('odd[1].txt',)
    monkeypatch.setenv('HOME', str(tmp_path))
    assert find_files('~/b.txt', SUFFIXES) == (str(tmp_path / 'b.txt'),)


@pytest.mark.parametrize(
    ('patterns', 'message'),
    [
        ('*.json', r"no file matches '\*\.json'"),
        ((), 'no files are given'),
        ('folder', r"folder: is a directory\. Give a glob: 'folder/\*\.txt\.gz'"),
        ('empty', r"empty: is a directory\. Give a glob: 'empty/\*\.txt'"),
        ('x.md', r'^x\.md: is of a kind that is not read here\. What is read ends in \.txt, \.txt\.gz'),
        ('*.md', r"x\.md: '\*\.md' matches a file of a kind that is not read\. .*\.txt, \.txt\.gz"),
        (('a.txt', '*'), r'x\.md: .*not read'),
        ('gs://bucket/*.txt', 'cannot be listed .*gcsfs'),
    ],
)
def test_globs_that_give_nothing_to_read_are_errors(tmp_path, monkeypatch, patterns, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'empty').mkdir()
    for name in ('a.txt', 'x.md', 'folder/x.txt.gz'):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=message):
        find_files(patterns, SUFFIXES)


def test_a_file_that_may_not_be_read_is_named(tmp_path_factory):
    folder = tmp_path_factory.mktemp('public')
    for parent in (folder, *folder.parents[:2]):
        os.chmod(parent, 0o755)
    path = folder / 'secret.txt'
    path.write_bytes(b'text')
    path.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read anything
    try:
        with pytest.raises(UserError, match=r'secret\.txt: cannot be read \(Permission denied\)'):
            list(stream_bytes(str(path)))
    finally:
        os.seteuid(user)


def test_a_file_that_is_gone_is_named(tmp_path):
    with pytest.raises(UserError, match=r'gone\.txt: cannot be read \(No such file'):
        list(stream_bytes(str(tmp_path / 'gone.txt')))


def test_a_store_that_fails_on_the_way_is_no_damaged_file():
    failing_store.register()
    for suffix, data in (('', bytes(1 << 19)), ('.gz', gzip.compress(os.urandom(1 << 16)))):
        with fsspec.open(f'failing://a.txt{suffix}', 'wb') as file:
            file.write(data)
        stream = stream_bytes(f'failing://a.txt{suffix}')
        assert next(stream)
        with pytest.raises(UnreadableFile, match=r"cannot be read \(KeyError: 'connection'\)"):
            list(stream)
