"""Rules by classifiers: thresholds, parts that are cut out, settings for some documents, chances, and mistakes."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llm.data.documents.classification.features import NgramFeatures
from llm.data.documents.classification.model import LinearClassifier
from llm.data.documents.classification.rules import Classifier, FastText
from llm.data.documents.document import Document
from llm.data.documents.quality.rules import Chance, Exempt, Pareto, Rules
from llm.data.documents.stage import Chain
from llm.errors import UserError

BOTH = ('rude', 'news')


@pytest.fixture
def directory(tmp_path):
    """Of two independent labels: each holds with 0.95 of a text of its own word alone, with 0.05 of other words."""
    features = NgramFeatures(1, (), 1 << 16, 'count', 'mean')
    weights = np.full((features.buckets, 2), -np.log(19), np.float32)
    for label, word in enumerate(('rude', 'news')):
        weights[features([word]).indices, label] = np.log(19)
    path = tmp_path / 'classifier'
    LinearClassifier(features, ('rude', 'news'), False, weights, np.zeros(2, np.float32)).save(path, 'float32')
    return str(path)


def judged(rules, *texts, **fields):
    return Rules((rules,))([Document(str(i), text, 'web', **fields) for i, text in enumerate(texts)])


def test_each_label_has_its_figure_and_thresholds(directory):
    rules = Classifier(directory=directory, labels=BOTH, name='harm', most=(('rude', 0.5),), least=(('news', 0.04),))
    assert rules.rules == ('harm/rude', 'harm/news')
    documents = judged(rules, 'rude rude', 'news', 'rude news', 'fine', '', '...')
    figures = [[verdict.value for verdict in document.verdicts] for document in documents]
    np.testing.assert_allclose(figures[:4], [[0.95, 0.05], [0.05, 0.95], [0.5, 0.5], [0.05, 0.05]], rtol=1e-5)
    assert figures[4:] == [[None, None]] * 2  # of these nothing can be said, and they stay
    assert [document.removed_by for document in documents] == ['harm/rude', *[None] * 5]
    (told,) = judged(Classifier(directory=directory, labels=('news',)), 'news')
    assert told.removed_by is None and [verdict.value for verdict in told.verdicts] == [pytest.approx(0.95)]


@pytest.mark.parametrize(
    ('remove', 'text', 'left'),
    [
        ('lines', 'fine\nrude\r\nfine too\n', 'fine\nfine too\n'),
        ('lines', 'rude\n\nfine', '\nfine'),
        ('lines', 'fine \n\n...', 'fine \n\n...'),
        ('paragraphs', 'fine\nrude fine fine\n\n rude\nrude\n \nfine', 'fine\nrude fine fine\n\n fine'),
        ('paragraphs', 'fine', 'fine'),
    ],
)
def test_parts_that_fail_are_cut_out(directory, remove, text, left):
    rules = Classifier(directory=directory, labels=BOTH, most=(('rude', 0.5),), remove=remove)
    (document,) = judged(rules, text)
    assert (document.text, document.removed_by) == (left, None)
    whole = judged(Classifier(directory=directory, labels=BOTH), text)[0]
    assert document.verdicts[0].value == whole.verdicts[0].value


def test_a_document_of_which_nothing_is_left_goes_by_the_label_that_cut_it(directory):
    rules = Classifier(directory=directory, labels=BOTH, most=(('rude', 0.5), ('news', 0.5)), remove='lines')
    mixed, other, empty = judged(rules, 'news\n\nnews', 'rude\nnews', ' ')
    assert [[verdict.keep for verdict in document.verdicts] for document in (mixed, other, empty)] == [
        [True, False],
        [False, False],
        [True, True],
    ]
    assert mixed.text == 'news\n\nnews'  # for who looks at what was removed


def test_thresholds_by_source_domain_and_language(directory):
    strict, lax = (Classifier(directory=directory, labels=BOTH, most=(('rude', most),)) for most in (0.5, 1.0))
    rules = Rules((strict,), exempt=(Exempt(lax, sources=('forum',), domains=('example.org',)),))
    documents = [
        Document(str(i), 'rude', source, domain=domain)
        for i, (source, domain) in enumerate(
            [('web', 'example.org'), ('forum', 'en.example.org'), ('forum', 'other.org')]
        )
    ]
    assert [document.removed_by is None for document in rules(documents)] == [False, True, False]
    assert [document.verdicts[0].value for document in rules(documents)] == [pytest.approx(0.95)] * 3


def test_the_pareto_rule_keeps_what_a_draw_of_numpys_would(directory):
    """GPT-3's condition np.random.pareto(alpha) > 1 - score, at scores of 0.5 and 0.05, of 4,000 documents each."""
    rules = Rules(
        (Classifier(directory=directory, labels=BOTH, least=(('news', 1.0),)),),
        chances=(Pareto('classifier/news', alpha=3),),
    )
    drawn = np.random.default_rng(0).pareto(3, 200_000)
    for text, score in (('news rude', 0.5), ('rude', 0.05)):
        documents = [Document(f'{text} {i}', text, 'web') for i in range(4000)]
        kept = [document.removed_by is None for document in rules(documents)]
        expected = (drawn > 1 - score).mean()
        assert abs(np.mean(kept) - expected) < 4 * np.sqrt(expected * (1 - expected) / 4000)
        assert kept == [document.removed_by is None for document in rules(documents[::-1])][::-1]
    other = dataclasses.replace(rules, chances=(Pareto('classifier/news', alpha=3, seed=1),))
    assert kept != [document.removed_by is None for document in other(documents)]
    fixed = dataclasses.replace(rules, chances=(Chance('classifier/news', ((0.0, 1.0),)),))
    assert all(document.removed_by is None for document in fixed(documents))


def test_identities_are_of_what_the_model_says(directory):
    rules = Rules((Classifier(directory=directory, labels=BOTH),))
    before = Chain((rules,)).identities()
    assert len(before) == 1
    model = LinearClassifier(
        NgramFeatures(buckets=4), ('rude', 'news'), False, np.ones((4, 2), np.float32), np.zeros(2, np.float32)
    )
    model.save(Path(directory), 'float32')
    assert Chain((rules,)).identities() == [model.digest] != before


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'most': (('toxic', 0.5),)}, "'toxic' is not one of its labels rude, news"),
        ({'labels': ('rude', 'rude')}, 'not different'),
        ({'least': (('rude', 50),)}, 'not from 0 to 1'),
        ({'remove': 'words'}, 'documents, lines, paragraphs'),
    ],
)
def test_settings_that_mean_nothing_are_refused(directory, settings, message):
    with pytest.raises(UserError, match=message):
        Classifier(**{'directory': directory, 'labels': BOTH, **settings})
    with pytest.raises(UserError, match='no classifier.json'):
        Classifier(directory=f'{directory}s', labels=BOTH).identities()
    with pytest.raises(UserError, match="no label 'toxic'.*rude, news"):
        judged(Classifier(directory=directory, labels=('toxic',)), 'text')
    with pytest.raises(UserError, match='not positive'):
        Pareto('classifier/rude', alpha=0)


def test_fasttext_needs_its_package_or_a_model(tmp_path):
    (tmp_path / 'model.bin').write_bytes(b'nothing')
    rules = FastText(model=str(tmp_path / 'model.bin'), labels=('hq', 'cc'), least=(('hq', 0.5),))
    assert rules.rules == ('fasttext/hq', 'fasttext/cc')
    with pytest.raises(UserError, match='fasttext-predict|no fastText model'):
        judged(rules, 'text')


def test_scoring_imports_no_jax(directory):
    program = (
        'import sys; from llm.data.documents.classification.rules import Classifier\n'
        f'print(Classifier(directory={directory!r}, labels=("rude",)).probabilities(["rude"])[0, 0])\n'
        'assert "jax" not in sys.modules'
    )
    result = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True)
    assert float(result.stdout) == pytest.approx(0.95)
