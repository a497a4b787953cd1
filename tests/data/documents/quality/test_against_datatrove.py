"""The rules against datatrove's filters, and words against spaCy's: document by document, rule by rule."""

import itertools
import random
import warnings

import pytest

from llm.data.documents.quality.c4 import C4
from llm.data.documents.quality.english_words import split_words
from llm.data.documents.quality.fineweb import FineWebQuality
from llm.data.documents.quality.gopher_quality import GopherQuality
from llm.data.documents.quality.gopher_repetition import GopherRepetition
from llm.data.documents.quality.rules import Rules
from tests.data.documents.quality.samples import documents, real_texts, synthetic_texts

pytestmark = pytest.mark.oracle

GOPHER_QUALITY = {
    'word_count': ({'min_doc_words': 50, 'max_doc_words': 100_000}, ('short_doc', 'long_doc')),
    'mean_word_length': (
        {'min_avg_word_length': 3, 'max_avg_word_length': 10},
        ('below_avg_threshold', 'above_avg_threshold'),
    ),
    'hash_ratio': ({'max_symbol_word_ratio': 0.1}, ('too_many_hashes',)),
    'ellipsis_ratio': ({'max_symbol_word_ratio': 0.1}, ('too_many_ellipsis',)),
    'bullet_lines': ({'max_bullet_lines_ratio': 0.9}, ('too_many_bullets',)),
    'ellipsis_lines': ({'max_ellipsis_lines_ratio': 0.3}, ('too_many_end_ellipsis',)),
    'alphabetic_words': ({'max_non_alpha_words_ratio': 0.8}, ('below_alpha_threshold',)),
    'stop_words': ({'min_stop_words': 2}, ('enough_stop_words',)),
}
REPETITION = {
    'paragraphs': ('dup_para_frac', 0.3),
    'paragraph_characters': ('dup_para_char_frac', 0.2),
    'lines': ('dup_line_frac', 0.3),
    'line_characters': ('dup_line_char_frac', 0.2),
}
FINEWEB = {
    'punctuated_lines': ('line_punct_thr', 0.12, 'line_punct_ratio'),
    'short_lines': ('short_line_thr', 0.67, 'short_line_ratio'),
    'repeated_characters': ('char_duplicates_ratio', 0.01, 'char_dup_ratio'),
    'line_ends': ('new_line_ratio', 0.3, 'list_ratio'),
}


def one_rule_each():
    """Our rule -> (datatrove's filter with this rule alone, the reasons that it gives)."""
    from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter

    filters = {}
    off = dict.fromkeys(itertools.chain.from_iterable(on for on, _ in GOPHER_QUALITY.values()))
    for rule, (on, reasons) in GOPHER_QUALITY.items():
        named = tuple(f'gopher_{reason}' for reason in reasons)
        filters[f'gopher_quality/{rule}'] = GopherQualityFilter(**off | on), named
    off = {name: None for name, _ in REPETITION.values()} | {'top_n_grams': (), 'dup_n_grams': ()}
    filters['gopher_repetition/empty'] = GopherRepetitionFilter(**off), ('empty',)
    for rule, (name, limit) in REPETITION.items():
        filters[f'gopher_repetition/{rule}'] = GopherRepetitionFilter(**off | {name: limit}), (name,)
    for kind, names in (('top', ('top_n_grams', 'top_{}_gram')), ('dup', ('dup_n_grams', 'duplicated_{}_n_grams'))):
        ours = GopherRepetition()
        for n, limit in ours.max_top_ngrams if kind == 'top' else ours.max_repeated_ngrams:
            rule = f'gopher_repetition/{"top_{}_gram" if kind == "top" else "repeated_{}_grams"}'.format(n)
            filters[rule] = GopherRepetitionFilter(**off | {names[0]: ((n, limit),)}), (names[1].format(n),)
    off = {'line_punct_thr': 0, 'short_line_thr': 1, 'char_duplicates_ratio': 1, 'new_line_ratio': 1e9}
    for rule, (name, limit, reason) in FINEWEB.items():
        filters[f'fineweb/{rule}'] = FineWebQualityFilter(**off | {name: limit}), (reason,)
    return filters


def theirs(filter_, text):
    """(kept, reason, text afterwards); a division by no words is no reason."""
    from datatrove.data import Document

    document = Document(text=text, id='x')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)  # the mean of no words
        try:
            result = filter_.filter(document)
        except ZeroDivisionError:
            result = True
    kept, reason = result if isinstance(result, tuple) else (result, None)
    return kept, reason, document.text


@pytest.fixture(scope='module')
def texts(dev_data):
    return synthetic_texts() + real_texts(dev_data, every=6)


def test_every_rule_alone(texts):
    """C4 apart: its rules rewrite the text."""
    filters = one_rule_each()
    judged = Rules((GopherRepetition(), GopherQuality(), FineWebQuality()))(documents(texts))
    differences, removed = [], dict.fromkeys(filters, 0)
    for text, document in zip(texts, judged, strict=True):
        verdicts = {verdict.rule: verdict.keep for verdict in document.verdicts}
        assert set(verdicts) == set(filters)
        for rule, (filter_, reasons) in filters.items():
            kept, reason, _ = theirs(filter_, text)
            if reason == 'empty' and rule == 'fineweb/punctuated_lines':
                reason = 'line_punct_ratio'  # a text without lines has none that are punctuated
            expected = kept or reason not in reasons
            removed[rule] += not expected
            if verdicts[rule] != expected:
                differences.append((rule, document.id, reason))
    assert not differences
    assert all(removed.values()), removed  # no rule that nothing tests


@pytest.mark.parametrize('punctuated', [True, False])
def test_c4(texts, punctuated):
    from datatrove.pipeline.filters import C4QualityFilter

    off = {'filter_lorem_ipsum': False, 'filter_curly_bracket': False, 'min_num_sentences': -1}
    filters = {
        'c4/lorem_ipsum': {'filter_lorem_ipsum': True},
        'c4/curly_brackets': {'filter_curly_bracket': True},
        'c4/sentences': {'min_num_sentences': 5},
    }
    judged = Rules((C4(punctuated_lines=punctuated),))(documents(texts))
    for rule, on in filters.items():
        filter_ = C4QualityFilter(filter_no_terminal_punct=punctuated, **off | on)
        removed = 0
        for text, document in zip(texts, judged, strict=True):
            kept, _, rewritten = theirs(filter_, text)
            verdict = next(verdict for verdict in document.verdicts if verdict.rule == rule)
            assert (document.id, verdict.keep) == (document.id, kept)
            removed += not kept
            if kept and document.removed_by is None:
                assert document.text == rewritten
        assert 0 < removed < len(texts)


def test_fineweb_chain(texts):
    """datatrove's examples/fineweb.py: which documents stay, the first rule that removes one, and the texts."""
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )

    sets = (GopherRepetition(), GopherQuality(), C4(punctuated_lines=False), FineWebQuality())
    filters = {
        'gopher_repetition': GopherRepetitionFilter(),
        'gopher_quality': GopherQualityFilter(),
        'c4': C4QualityFilter(filter_no_terminal_punct=False),
        'fineweb': FineWebQualityFilter(),
    }
    kept = 0
    for text, document in zip(texts, Rules(sets)(documents(texts)), strict=True):
        removed_by = None
        rewritten = text
        for name, filter_ in filters.items():
            stays, reason, rewritten = theirs(filter_, rewritten)
            if not stays:
                removed_by = (name, reason)
                break
        by = (document.removed_by or '').split('/')[0]
        assert (document.id, by) == (document.id, removed_by[0] if removed_by else '')
        if removed_by is None:
            kept += 1
            assert document.text == rewritten
    assert kept > len(texts) / 10


def test_words_are_those_of_spacy(dev_data):
    """Of real text, and of random pieces that are made of what the rules of words look for."""
    import spacy

    tokenizer = spacy.blank('en').tokenizer
    draw = random.Random(0)
    parts = [*'aAzZbs09.,\'’"-:()!?…$%&/@#+~=<>[]{}*^_|\\°é€“”', 'll', "n't", 'www.', '.com', 'http://', 'km', 'Mr.']
    parts += ['a.m.', 'i.e', '--', '...', 'US$', "'s", 'can', 'do', '5', 'he', '😀', 'ß', '中', 'अ']
    pieces = {''.join(draw.choices(parts, k=draw.randint(1, 7))) for _ in range(4000)}
    pieces |= {piece for text in real_texts(dev_data, every=2) for piece in text.split()}
    # Letters of Cyrillic, Greek and Latin that spaCy does not list are no letters to it.
    known = [piece for piece in pieces if not any(0x180 <= ord(c) < 0x530 or 0x1E00 <= ord(c) < 0x2000 for c in piece)]
    assert len(known) > 10_000
    wrong = {piece for piece in known if split_words(piece) != [token.text for token in tokenizer(piece)]}
    assert not wrong
