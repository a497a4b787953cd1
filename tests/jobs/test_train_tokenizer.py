"""The train_tokenizer job and its report."""

import html.parser
import json
import subprocess
import sys

import numpy as np
import pytest

from llm.configuration import Invocation, load_job
from llm.data.sources import StandardLibrary, TextFiles, read_documents
from llm.data.vocabularies import ByteVocabulary, VocabularyConfig, load_vocabulary
from llm.data.vocabularies.measuring import measure_fit
from llm.data.vocabularies.training import sample_documents
from llm.errors import UserError
from llm.jobs.train_tokenizer import NamedSource, TrainTokenizer

RUN = Invocation(dry_run=False, operative_config='# a config\n', command=(), config_files=())
STORY = 'Once upon a time, on day {i}, there was a tortoise <<<<&&&& that outran {j} hares.\nIt was steady.\n'


@pytest.fixture
def stories(tmp_path):
    lines = [json.dumps({'text': STORY.format(i=i, j=i * 7919 % 1000) * 2}) for i in range(2000)]
    (tmp_path / 'stories.jsonl').write_text('\n'.join([*lines, 'not JSON']))
    return TextFiles(str(tmp_path / 'stories.jsonl'), validation_fraction=0.05)


def job(tmp_path, stories, **settings):
    settings = {
        'vocabulary': VocabularyConfig('byte_level_bpe', 700, sample_bytes=200_000),
        'sources': (NamedSource('stories', stories), NamedSource('library', StandardLibrary())),
        'held_out_bytes': 20_000,
        **settings,
    }
    return TrainTokenizer(str(tmp_path / 'out'), **settings)


def test_it_learns_from_equal_bytes_and_reports_what_it_did(tmp_path, stories, capsys):
    job(tmp_path, stories)(RUN)
    vocabulary = load_vocabulary(tmp_path / 'out')
    report = json.loads((tmp_path / 'out' / 'report.json').read_text())
    assert (report['kind'], report['size'], report['digest']) == ('byte_level_bpe', 700, vocabulary.digest)
    assert (tmp_path / 'out' / 'config.gin').read_text() == '# a config\n'

    assert list(report['sources']) == ['stories', 'library']
    assert [source['sampled_bytes'] for source in report['sources'].values()] == [100_000, 100_000]
    held_out = sample_documents(read_documents(stories, 'validation'), 20_000, seed=0)
    ids = [vocabulary.encode(text) for text in held_out]
    tokens, num_bytes = sum(map(len, ids)), sum(len(text.encode()) for text in held_out)
    figures = report['sources']['stories']
    assert figures['held_out_bytes'] == num_bytes
    assert figures['held_out_bytes_per_token'] == pytest.approx(num_bytes / tokens)
    assert figures['held_out_tokens_per_word'] == pytest.approx(tokens / sum(len(t.split()) for t in held_out))
    assert figures['train']['skipped'] == 1
    assert any(
        warning.startswith('stories, train: 0 documents with invalid UTF-8, 1 bad') for warning in report['warnings']
    )

    table = vocabulary.token_bytes()
    longest = report['longest_tokens']
    assert [token['bytes'] for token in longest] == sorted((len(t) for t in table), reverse=True)[:200]
    assert all(table[token['id']].decode(errors='backslashreplace') == token['text'] for token in longest)
    assert all(token['uses'] == 0 for token in report['unused_tokens'])
    shown = {token['text'] for token in report['unused_tokens']}
    assert '\\xff' in shown  # no UTF-8 has this byte
    assert 'library' in capsys.readouterr().out


class _Checker(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.texts, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ('src', 'href')]
        if tag != 'meta':
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_complete_in_itself_and_shows_tokens_as_text(tmp_path, stories):
    job(tmp_path, stories)(RUN)
    page = _Checker()
    page.feed((tmp_path / 'out' / 'report.html').read_text())
    assert page.open == []
    assert page.links == []
    longest = json.loads((tmp_path / 'out' / 'report.json').read_text())['longest_tokens']
    assert any('<&' in token['text'] for token in longest)
    for token in longest:
        assert token['text'].replace(' ', '·').replace('\n', '⏎').replace('\t', '→') in page.texts


def test_it_is_done_once_and_never_over_another_config(tmp_path, stories, capsys):
    job(tmp_path, stories)(RUN)
    written = (tmp_path / 'out' / 'report.json').stat().st_mtime_ns
    capsys.readouterr()
    job(tmp_path, stories)(RUN)
    assert 'complete; see' in capsys.readouterr().out
    assert (tmp_path / 'out' / 'report.json').stat().st_mtime_ns == written
    with pytest.raises(UserError, match=r'another config: held_out_bytes 20000 there, 10000 here'):
        job(tmp_path, stories, held_out_bytes=10_000)(RUN)


def test_other_programs_get_the_same_vocabulary(tmp_path, stories):
    job(tmp_path, stories)(RUN)
    ours, theirs = (load_vocabulary(tmp_path / 'out' / name) for name in ('vocabulary', 'hugging_face'))
    assert (tmp_path / 'out' / 'hugging_face' / 'tokenizer.json').exists()
    assert theirs.encode('once upon a time 🐢') == ours.encode('once upon a time 🐢')
    assert theirs.special_ids == ours.special_ids


def test_a_run_that_was_killed_before_its_report_ends_the_same(tmp_path, stories):
    job(tmp_path, stories)(RUN)
    first = (tmp_path / 'out' / 'report.json').read_bytes()
    for name in ('report.json', 'report.html', 'vocabulary/vocabulary.json', 'vocabulary/vocab.bpe'):
        (tmp_path / 'out' / name).unlink()
    job(tmp_path, stories)(RUN)
    assert (tmp_path / 'out' / 'report.json').read_bytes() == first


def test_a_dry_run_says_what_it_would_do_and_does_nothing(tmp_path, stories, capsys):
    job(tmp_path, stories)(Invocation(True, '', (), ()))
    said = capsys.readouterr().out
    assert 'byte_level_bpe vocabulary of 700 tokens' in said
    assert 'stories: up to 100,000 bytes; 1 shards to learn from' in said
    assert not (tmp_path / 'out').exists()


def test_a_source_that_is_too_small_is_said(tmp_path, stories):
    (tmp_path / 'small.txt').write_text('A small text.\n' * 10)
    (tmp_path / 'held_out.txt').write_text('Another text.\n')
    small = TextFiles(str(tmp_path / 'small.txt'), validation_files=str(tmp_path / 'held_out.txt'))
    job(tmp_path, stories, sources=(NamedSource('stories', stories), NamedSource('small', small)))(RUN)
    report = json.loads((tmp_path / 'out' / 'report.json').read_text())
    assert 'small has only 140 bytes of its share of 100,000: uneven sample' in report['warnings']


def test_bytes_are_measured_too(tmp_path, stories):
    job(tmp_path, stories, vocabulary=VocabularyConfig('bytes', None))(RUN)
    report = json.loads((tmp_path / 'out' / 'report.json').read_text())
    assert [source['held_out_bytes_per_token'] for source in report['sources'].values()] == [1.0, 1.0]
    assert load_vocabulary(tmp_path / 'out') == ByteVocabulary()


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'sources': ()}, 'no sources'),
        ({'sources': (NamedSource('a', StandardLibrary()),) * 2}, "source name 'a' is given twice"),
        ({'sources': (NamedSource('a/b', StandardLibrary()),)}, "source name 'a/b'"),
        ({'held_out_bytes': 0}, 'not positive'),
        ({'vocabulary': VocabularyConfig(size=1000, sample_bytes=1)}, '1 sample bytes cannot be shared by 2 sources'),
        (
            {'vocabulary': VocabularyConfig()},
            "VocabularyConfig.size: a vocabulary of kind 'byte_level_bpe' needs a size",
        ),
    ],
)
def test_settings_are_checked(tmp_path, stories, settings, message):
    with pytest.raises(UserError, match=message):
        job(tmp_path, stories, **settings)


def test_the_gin_file_describes_this_job():
    loaded, _ = load_job(['gin_configs/runs/train_tokenizer.gin'], ["FILES = 'my/*.txt'", 'SIZE = 1000'])
    assert isinstance(loaded, TrainTokenizer)
    assert loaded.vocabulary.size == 1000
    assert [named.name for named in loaded.sources] == ['files', 'standard_library']
    assert loaded.sources[0].source == TextFiles('my/*.txt')


def test_the_job_starts_without_jax_and_tensorflow():
    code = 'import sys, llm.jobs.train_tokenizer; print(*{name.partition(".")[0] for name in sys.modules})'
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert not {'jax', 'tensorflow', 'seqio'} & set(run.stdout.split())


def test_measure_fit_counts_by_hand():
    vocabulary = ByteVocabulary()
    fit = measure_fit(vocabulary, ['ab a', 'é', ''] * 200)
    assert (fit.documents, fit.bytes, fit.words, fit.tokens) == (600, 1200, 600, 1200)
    assert (fit.bytes_per_token, fit.fertility) == (1.0, 2.0)
    expected = np.zeros(vocabulary.size)
    for character, uses in ((ord('a'), 400), (ord('b'), 200), (ord(' '), 200), (0xC3, 200), (0xA9, 200)):
        expected[3 + character] = uses
    assert np.array_equal(fit.uses, expected)
