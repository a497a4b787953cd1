"""The corpus that every machine has."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from llm.data.sources import ReadCounts, StandardLibrary, read_documents
from llm.data.sources.standard_library import library_folder, near_duplicate_families
from llm.errors import UserError


def paths(split):
    (shard,) = StandardLibrary().shards(split)
    return shard.paths


def test_it_is_the_source_files_of_the_library_without_tests_and_tables():
    chosen = sorted(paths('train') + paths('validation'))
    assert {'argparse.py', 'asyncio/events.py', 'encodings/utf_8.py', 'json/decoder.py'} < set(chosen)
    for path in chosen:
        folders = path.split('/')
        assert not {'test', 'tests', 'idle_test', 'site-packages'} & set(folders), path
        assert not folders[-1].startswith('test_'), path
        assert not path.startswith('encodings/cp'), path
        assert '_sysconfigdata' not in path
        assert folders[0].removesuffix('.py') in sys.stdlib_module_names
    counts = ReadCounts()
    documents = [
        *read_documents(StandardLibrary(), 'train', counts),
        *read_documents(StandardLibrary(), 'validation', counts),
    ]
    assert 8_000_000 < counts.bytes < 16_000_000
    assert len(set(documents)) == len(documents) == len(chosen)


def test_the_splits_are_disjoint_and_no_family_is_on_both_sides():
    train, validation = set(paths('train')), set(paths('validation'))
    assert not train & validation
    assert 0.04 < len(StandardLibrary().validation_bytes()) / len(StandardLibrary().train_bytes()) < 0.1
    families = near_duplicate_families(library_folder())
    assert sorted(path for family in families for path in family) == sorted(train | validation)
    assert all(set(family) <= train or set(family) <= validation for family in families)
    character_maps = next(family for family in families if 'encodings/iso8859_1.py' in family)
    assert {'encodings/iso8859_15.py', 'encodings/koi8_r.py', 'encodings/mac_roman.py'} < set(character_maps)
    assert ('bz2.py', 'lzma.py') in families


def test_bytes_and_documents_are_the_same_text():
    text = ''.join(read_documents(StandardLibrary(), 'validation'))
    assert text.encode() == StandardLibrary().validation_bytes()
    first = paths('validation')[0]
    assert text.encode().startswith(Path(library_folder(), first).read_bytes())


def test_the_salt_and_the_fraction_choose():
    assert StandardLibrary(split_salt=1).shards('validation')[0].paths != paths('validation')
    assert set(StandardLibrary(validation_fraction=0.2).shards('validation')[0].paths) > set(paths('validation'))
    with pytest.raises(UserError, match='not between 0 and 1'):
        StandardLibrary(validation_fraction=0)


def test_shards_can_be_sent_to_another_process():
    (shard,) = StandardLibrary().shards('validation')
    sent = pickle.loads(pickle.dumps(shard))
    assert sent.fingerprint() == shard.fingerprint() != StandardLibrary().shards('train')[0].fingerprint()
    assert len(pickle.dumps(shard)) < 100_000


def test_another_process_finds_the_same_corpus_and_imports_none_of_it():
    # Codecs of source files and the interpreter's build settings are what Python itself loads meanwhile.
    code = """
import sys
from llm.data.sources import StandardLibrary
before = set(sys.modules)
print(StandardLibrary().corpus_digest())
new = {name for name in set(sys.modules) - before if not name.startswith(('encodings.', '_sysconfigdata'))}
assert not new, new
"""
    digest = StandardLibrary().corpus_digest()
    assert len(digest) == 64
    for seed in ('1', '2'):
        environment = {**os.environ, 'PYTHONHASHSEED': seed}
        run = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == digest


def write_library(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_duplicates_and_near_duplicates_in_a_made_up_library(tmp_path):
    lines = [f'line_{i} = {i}\n' for i in range(40)]
    files = {
        'abc.py': ''.join(lines),
        'ast.py': ''.join(lines),  # the same as abc.py
        'bdb.py': ''.join(lines[:30]),  # near abc.py
        'cmd.py': ''.join(lines[22:] + [f'other_{i} = {i}\n' for i in range(10)]),  # near abc.py, hardly near bdb.py
        'csv.py': 'import io\n',
        'json/__init__.py': '',
        'json/tests/test_json.py': 'assert True\n',
        'site-packages/numpy.py': 'zeros = 0\n',
        'mine.py': 'not the library\n',
        'encodings/cp437.py': 'table = 1\n',
        'encodings/aliases.py': 'aliases = {}\n',
    }
    expected = (('abc.py', 'bdb.py', 'cmd.py'), ('csv.py',), ('encodings/aliases.py',))
    write_library(tmp_path / 'forwards', files)
    write_library(tmp_path / 'backwards', dict(reversed(files.items())))
    assert near_duplicate_families(str(tmp_path / 'forwards')) == expected
    assert near_duplicate_families(str(tmp_path / 'backwards')) == expected


def test_an_interpreter_without_library_sources_is_an_error(tmp_path):
    with pytest.raises(UserError, match='no library source files here'):
        near_duplicate_families(str(tmp_path))
