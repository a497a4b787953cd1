"""The train_classifier job: what it writes, that files and their order change no bit, that the stage says the same."""

import dataclasses
import html.parser
import itertools
import json
import random
import re

import numpy as np
import pyarrow.parquet
import pytest

from llm.configuration import Invocation, load_job
from llm.data.documents.classification.examples import Examples, passages
from llm.data.documents.classification.features import NgramFeatures
from llm.data.documents.classification.model import load
from llm.data.documents.classification.rules import Classifier
from llm.data.documents.document import Document
from llm.data.documents.quality.rules import Rules
from llm.data.documents.sources.records import JsonLines
from llm.errors import UserError
from llm.jobs.train_classifier import TrainClassifier
from llm.main import main
from llm.training.linear_classifier import LinearTraining

RUN = Invocation(dry_run=False, operative_config='# a config\n', command=(), config_files=())
WORDS = [f'word{i}' for i in range(60)]
LABELS = ('toxic', 'hate')
MENU = 'a menu that is at the top of every page\n'


def texts(count, seed, favourite):
    """Each of eight words, of which a third are from six that its class prefers."""
    drawn = random.Random(seed)
    preferred = WORDS[favourite : favourite + 6]
    return [
        ' '.join(drawn.choice(preferred if drawn.random() < 0.35 else WORDS) for _ in range(8)) for _ in range(count)
    ]


def write(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(path)


@pytest.fixture
def rows():
    """Records with a label each, and columns of two independent labels."""
    rows = []
    for favourite, label in ((0, 'good'), (20, 'bad')):
        for text in texts(200, favourite, favourite):
            columns = {'toxic': int(label == 'bad'), 'hate': label == 'bad' and len(rows) % 3 == 0}
            rows.append({'text': text, 'label': label, 'pair': len(rows) % 200, **columns})
    return rows


def job(directory, *examples, **settings):
    settings = {
        'labels': ('good', 'bad'),
        'features': NgramFeatures(buckets=1 << 14),
        'training': LinearTraining(epochs=4, batch_size=64, learning_rate=0.1),
        **settings,
    }
    return TrainClassifier(str(directory), examples, **settings)


def labelled(name, path, **settings):
    return Examples(JsonLines(name=name, files=path), **({'label_field': 'label'} | settings))


class _Balanced(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        assert not {'src', 'href'} & {name for name, _ in attrs}  # complete in one file
        if tag not in ('meta', 'path', 'polyline', 'polygon'):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ('path', 'polyline', 'polygon'):
            assert self.open.pop() == tag


def test_it_learns_measures_and_writes_and_the_stage_says_what_it_measured(tmp_path, rows, capsys):
    rows += [{'text': '...', 'label': 'good'}, rows[0], {**rows[1], 'label': 'bad'}]
    path = write(tmp_path / 'rows.jsonl', rows)
    (tmp_path / 'rows.jsonl').open('a').write('not JSON\n')
    job(tmp_path / 'out', labelled('rows', path), storage='int8')(RUN)
    out = tmp_path / 'out'
    assert not (out / 'examples').exists()
    metrics = json.loads((out / 'metrics.json').read_text())
    counted = metrics['examples']
    assert (counted['bad records'], counted['without words'], counted['repeated texts']) == (1, 1, 2)
    assert counted['repeated with other labels'] == 1
    few, fell, contradicting = metrics['warnings']
    assert few.startswith('Only ') and "SOLVER = 'lbfgs'" in few
    assert fell.startswith('The loss still fell in the last epoch') and contradicting.startswith('1 texts')
    good, bad = metrics['labels']['good'], metrics['labels']['bad']
    assert (good['positive'], good['negative']) == (bad['negative'], bad['positive'])
    assert good['positive'] + good['negative'] == counted['held_out'] == 81
    assert good['roc_auc'] == pytest.approx(bad['roc_auc']) and good['roc_auc'] > 0.9
    telling = metrics['telling_ngrams']['good']
    assert {row['ngram'] for row in telling['for'][:5]} <= set(WORDS[:6])
    assert {row['ngram'] for row in telling['against'][:5]} <= {
        *WORDS[20:26],
        'word24 | word26 word8',
    }  # two n-grams of one bucket
    counts = sum('word0' in row['text'].split() for row in rows)
    assert 0 < next(row['examples'] for row in telling['for'] if row['ngram'] == 'word0') < counts

    table = pyarrow.parquet.read_table(out / 'held_out.parquet').to_pydict()
    documents = [Document(str(i), text, 'web') for i, text in enumerate(table['excerpt'])]
    judged = Rules((Classifier(directory=str(out), labels=('good',), least=(('good', 0.5),)),))(documents)
    assert [document.verdicts[0].value for document in judged] == table['good.probability']
    kept = np.array([document.removed_by is None for document in judged])
    assert np.mean(kept == np.array(table['good.holds'])) == metrics['accuracy']
    assert load(str(out)).digest == metrics['digest']

    page = (out / 'report.html').read_text()
    parser = _Balanced()
    parser.feed(page)
    assert parser.open == [] and page.count('<figure') == 4 and 'word0' in page
    capsys.readouterr()
    job(out, labelled('rows', path), storage='int8')(RUN)
    assert 'complete' in capsys.readouterr().out
    weights = (out / 'weights.npz').read_bytes()
    (out / 'weights.npz').unlink()
    job(out, labelled('rows', path), storage='int8')(RUN)
    assert 'complete' not in capsys.readouterr().out
    assert (out / 'weights.npz').read_bytes() == weights
    with pytest.raises(UserError, match='another config'):
        job(out, labelled('rows', path))(RUN)


def test_neither_files_nor_their_order_change_a_bit(tmp_path, rows):
    digests = set()
    for seed, cuts in ((0, (0, 400)), (1, (0, 70, 400)), (0, (0, 400))):
        shuffled = random.Random(seed).sample(rows, len(rows))
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for part, (a, b) in enumerate(itertools.pairwise(cuts)):
            write(folder / f'{part}.jsonl', shuffled[a:b])
        job(folder / 'out', labelled('rows', str(folder / '*.jsonl')))(RUN)
        digests.add((folder / 'out' / 'weights.npz').read_bytes())
        digests.add((folder / 'out' / 'metrics.json').read_bytes())
    assert len(digests) == 2
    other = dataclasses.replace(job(tmp_path / 'other', labelled('rows', str(folder / '*.jsonl'))))
    dataclasses.replace(other, training=dataclasses.replace(other.training, seed=1))(RUN)
    assert (tmp_path / 'other' / 'weights.npz').read_bytes() not in digests


def test_independent_labels_groups_passages_and_lbfgs(tmp_path, rows):
    for row in rows:
        row['text'] = f'{MENU}{row["text"]}\n{row["text"][::-1]}\n'
    path = write(tmp_path / 'rows.jsonl', rows)
    examples = labelled('rows', path, label_field=None, label_columns=True, group_field='pair', passage_characters=40)
    training = LinearTraining(solver='lbfgs', l2=1e-4)
    job(tmp_path / 'out', examples, labels=LABELS, exclusive=False, training=training)(RUN)
    metrics = json.loads((tmp_path / 'out' / 'metrics.json').read_text())
    assert metrics['labels']['toxic']['roc_auc'] > 0.9 > metrics['labels']['hate']['roc_auc'] > 0.5
    hate, contradicting = metrics['warnings']  # and no word of Adam
    assert hate.startswith('Held-out examples with the label hate: 18.') and 'texts are there' in contradicting
    assert metrics['history'][0]['largest_gradient'] < 1e-4 and 'accuracy' not in metrics
    table = pyarrow.parquet.read_table(tmp_path / 'out' / 'held_out.parquet').to_pydict()
    held_out = set(table['excerpt'])
    assert MENU not in held_out and 60 < metrics['examples']['held out, but trained on elsewhere'] < 100
    pairs = {row['pair'] for row in rows if any(part in held_out for part in passages(row['text'], 40))}
    whole = [part for row in rows if row['pair'] in pairs for part in passages(row['text'], 40)]
    assert held_out == {*whole} - {MENU} and len(pairs) < 80
    assert set(load(str(tmp_path / 'out')).probabilities(['word20']).shape) == {1, 2}


def test_passages_end_at_lines_or_words_and_joined_are_the_text():
    text = 'one two\nthree four five six seven eight nine ten\n' * 3 + 'x' * 50
    for characters in (0, 1, 7, 20):
        parts = list(passages(text, characters))
        assert ''.join(parts) == text
        assert characters == 0 or all(characters <= len(part) <= 2 * characters for part in parts[:-1])
    assert list(passages('aaa bbb\nccc ddd', 4)) == ['aaa bbb\n', 'ccc ddd']


GIN, FILTER = 'gin_configs/runs/train_classifier.gin', 'gin_configs/runs/filter_by_classifier.gin'


def test_the_run_file_asks_for_two_globs_and_plans(tmp_path, rows, capsys):
    good, bad = (
        write(tmp_path / f'{label}.jsonl', [row for row in rows if row['label'] == label]) for label in ('good', 'bad')
    )
    bindings = [f'GOOD="{good}"', f'BAD="{bad}"', f'OUTPUT_DIRECTORY="{tmp_path / "out"}"']
    loaded, _ = load_job([GIN], bindings)
    assert (loaded.labels, loaded.features, loaded.training) == (('good', 'bad'), NgramFeatures(), LinearTraining())
    assert main([f'--gin_file={GIN}', *(f'--gin_bindings={b}' for b in bindings), '--dry_run']) == 0
    assert 'good: 1 shards' in capsys.readouterr().out
    assert not (tmp_path / 'out').exists()
    small = [f'--gin_bindings={setting}' for setting in ('EPOCHS=1', 'BUCKETS=65536', 'HELD_OUT=0.1')]
    assert main([f'--gin_file={GIN}', *(f'--gin_bindings={b}' for b in bindings), *small]) == 0
    printed, page = capsys.readouterr().out, (tmp_path / 'out' / 'report.html').read_text()
    assert 'ROC AUC' in printed
    for text in (printed, page):
        assert re.search(r'Held-out examples with the label good: [12]\d\. Too few to measure by', text)
        assert 'without the label' not in text

    documents = pyarrow.table({'text': [row['text'] for row in rows], 'id': [str(i) for i in range(len(rows))]})
    pyarrow.parquet.write_table(documents, tmp_path / 'all.parquet')
    chance = ["rules.Pareto.rule = 'classifier/good'", "LEAST = (('good', 1.0),)", 'CHANCES = (@rules.Pareto(),)']
    for name, settings in (('half', []), ('pareto', chance)):
        chosen = [f'FILES="{tmp_path}/all.parquet"', f'CLASSIFIER="{tmp_path / "out"}"', *settings]
        chosen += [f'OUTPUT_DIRECTORY="{tmp_path / name}"', 'prepare_data.PrepareData.processes = 1']
        chosen.append('prepare_data.PrepareData.report = None')
        assert main([f'--gin_file={FILTER}', *(f'--gin_bindings={b}' for b in chosen)]) == 0
        ledger = pyarrow.parquet.read_table(tmp_path / name / 'ledger' / '000000.parquet').to_pydict()
        scores = np.array(ledger['classifier/good.value'])
        expected = load(str(tmp_path / 'out')).probabilities([row['text'] for row in rows])[:, 0]
        np.testing.assert_array_equal(scores, expected.astype(np.float32))
        kept = np.array([rule is None for rule in ledger['removed_by']])
        if name == 'half':
            np.testing.assert_array_equal(kept, expected >= 0.5)
        else:
            wanted = ((2 - expected) ** -9.0).sum()
            assert kept.any() and abs(kept.sum() - wanted) < 4 * np.sqrt(wanted)
    assert (
        main([f'--gin_file={FILTER}', *(f'--gin_bindings={b}' for b in chosen), '--gin_bindings=LEAST=(("x", 1.0),)'])
        == 2
    )
    assert "error: thresholds of Classifier: 'x' is not one of its labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ('good', 'bad', 'message'),
    [
        ('', '', 'no example was read'),
        ('{"text": "a b"}\n' * 9, '', "of 9 usable examples all have the label 'good'"),
        ('{"text": "..."}\n', '{"text": "a b"}\n', "of 1 usable examples none have the label 'good'"),
        ('{"txt": "a b"}\n', '{"txt": "a b"}\n', 'no example was read.*2 bad records'),
        (
            ''.join(f'{{"text": "a b {i}"}}\n' for i in range(9)),
            '{"text": "c"}\n',
            "held-out examples all have .*'good'",
        ),
    ],
)
def test_bad_examples_end_in_one_line(tmp_path, capfd, good, bad, message):
    (tmp_path / 'good.jsonl').write_text(good)
    (tmp_path / 'bad.jsonl').write_text(bad)
    bindings = [f'{name.upper()}="{tmp_path / name}.jsonl"' for name in ('good', 'bad')]
    bindings.append(f'OUTPUT_DIRECTORY="{tmp_path / "out"}"')
    assert main([f'--gin_file={GIN}', *(f'--gin_bindings={b}' for b in bindings)]) == 2
    *before, last = capfd.readouterr().err.splitlines()
    assert last.startswith('error: ') and re.search(message, last), last
    assert not any('Traceback' in line for line in before)
    assert not (tmp_path / 'out' / 'metrics.json').exists() and not (tmp_path / 'out' / 'examples').exists()


@pytest.mark.parametrize(
    ('record', 'examples', 'settings', 'message'),
    [
        ({}, {}, {}, r"rows.jsonl:1: has no field 'label'"),
        ({'label': 'odd'}, {}, {}, "label 'odd' is not one of good, bad"),
        ({'label': ['good', 'bad']}, {}, {}, 'has 2 labels'),
        ({'label': []}, {}, {}, 'has 0 labels'),
        ({'good': 1}, {'label_field': None, 'label_columns': True}, {}, "no field 'bad'"),
        ({'good': 'yes', 'bad': 0}, {'label_field': None, 'label_columns': True}, {}, "'yes' in field 'good'"),
        ({'label': 'good'}, {'group_field': 'site'}, {}, "no field 'site'"),
        ({}, {'label_field': None}, {}, 'one of labels, label_field'),
        ({}, {'label_field': None, 'labels': ('toxic',)}, {}, "'toxic' of source 'rows' is not in labels"),
        ({}, {'passage_characters': -1}, {}, 'negative'),
        ({}, {}, {'labels': ('good',)}, 'at least 2'),
        ({}, {}, {'labels': ('a/b', 'c')}, 'slash'),
        ({}, {}, {'held_out': 0.0}, 'nothing to learn from'),
        ({}, {}, {'storage': 'int4'}, 'float32, int8'),
        ({}, {}, {'precisions': (90.0,)}, 'at most 1'),
    ],
)
def test_labels_and_settings_that_make_no_sense_are_refused(tmp_path, record, examples, settings, message):
    path = write(tmp_path / 'rows.jsonl', [{'text': 'a b', 'title': 'c', **record}])
    with pytest.raises(UserError, match=message):
        job(tmp_path / 'out', labelled('rows', path, **examples), **settings)(RUN)
