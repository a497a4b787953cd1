"""Rules on both sides of their thresholds, odd documents, batches, thresholds for some documents, chances, mistakes."""

import dataclasses
import itertools
import math
import random
import zlib
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data.documents.document import Document
from llm.data.documents.quality import words
from llm.data.documents.quality.c4 import C4
from llm.data.documents.quality.code import Code
from llm.data.documents.quality.fineweb import FineWebQuality
from llm.data.documents.quality.gopher_quality import GopherQuality
from llm.data.documents.quality.gopher_repetition import GopherRepetition
from llm.data.documents.quality.outliers import Outliers
from llm.data.documents.quality.refinedweb import RefinedWebLines
from llm.data.documents.quality.rules import Chance, Exempt, Rules
from llm.errors import UserError
from tests.data.documents.quality.samples import documents, prose, synthetic_texts

SETS = (GopherRepetition(), GopherQuality(), RefinedWebLines(), Code(), Outliers(), C4(), FineWebQuality())


def judge(rules, *texts, **fields):
    return Rules((rules,))(documents(texts, **fields))


def verdict(document, rule):
    return next(verdict for verdict in document.verdicts if verdict.rule == rule)


def lines(*parts):
    return '\n'.join(parts)


TOP_3, TWICE_5 = GopherRepetition(max_top_ngrams=((3, 0.5),)), GopherRepetition(max_repeated_ngrams=((5, 0.2),))
TWICE = 'a b c d e ' * 2
# Rule, set, a text that is just kept, one that is just not, and the values of both.
THRESHOLDS = [
    ('gopher_quality/word_count', GopherQuality(min_words=3), 'one two three.', 'one two.', 3, 2),
    ('gopher_quality/word_count', GopherQuality(min_words=1, max_words=3), 'one two three!!', 'a b c d', 3, 4),
    ('gopher_quality/mean_word_length', GopherQuality(), 'ab abcd .', 'ab abc', 3, 2.5),
    ('gopher_quality/mean_word_length', GopherQuality(), 'abcdefghij', 'abcdefghijk !', 10, 11),
    ('gopher_quality/hash_ratio', GopherQuality(), 'a b c d e f g hh i #', 'a b c d e f g h #', 0.1, 1 / 9),
    ('gopher_quality/ellipsis_ratio', GopherQuality(), 'a b c d e f g h i …', 'a b c d e f g h ...', 0.1, 1 / 9),
    ('gopher_quality/bullet_lines', GopherQuality(), '- a\n' * 9 + 'b', ' • a\n' * 10 + 'b', 0.9, 10 / 11),
    ('gopher_quality/ellipsis_lines', GopherQuality(), 'a...\n' * 3 + 'b\n' * 7, 'a… \n' * 3 + 'b\n' * 6, 0.3, 1 / 3),
    ('gopher_quality/alphabetic_words', GopherQuality(), 'a b c d 5', 'a b c 5', 0.8, 0.75),
    ('gopher_quality/stop_words', GopherQuality(), 'the end of it', 'the the end', 2, 1),
    ('gopher_repetition/empty', GopherRepetition(), '.', '', 1, 0),
    ('gopher_repetition/paragraphs', GopherRepetition(), '\n\n'.join('abcdefgaaa'), 'a\n\na\n\nb', 0.3, 1 / 3),
    ('gopher_repetition/paragraph_characters', GopherRepetition(), 'aa\n\naa\n\nbb', 'aaa\n\naaa\n\nb', 0.2, 3 / 11),
    ('gopher_repetition/lines', GopherRepetition(), '\n'.join('abcdefgaaa'), 'a\na\n\nb', 0.3, 1 / 3),
    ('gopher_repetition/line_characters', GopherRepetition(), 'a\na\nb', 'aa\naa\nb', 0.2, 2 / 7),
    ('gopher_repetition/top_2_gram', GopherRepetition(), 'a b c a b ' + 'x' * 20, 'a b c a b ' + 'x' * 19, 0.2, 6 / 29),
    ('gopher_repetition/top_3_gram', TOP_3, 'a b c a b c ' + 'x' * 8, 'a b c a b c ' + 'x' * 7, 0.5, 10 / 19),
    ('gopher_repetition/repeated_5_grams', TWICE_5, TWICE + 'x' * 5, TWICE + 'x' * 4, 0.2, 5 / 24),
    ('fineweb/punctuated_lines', FineWebQuality(min_punctuated_lines=0.5), 'a.\nb', 'a。\n\nb\nc', 0.5, 1 / 3),
    ('fineweb/short_lines', FineWebQuality(), 'a\nb\n' + 'x' * 31, 'a' * 30 + '\nb\n \nc\n' + 'x' * 31, 2 / 3, 0.75),
    ('fineweb/repeated_characters', FineWebQuality(), 'a\na\n' + 'x' * 98, 'a\na\n' + 'x' * 97, 0.01, 1 / 99),
    ('fineweb/line_ends', FineWebQuality(max_line_ends=0.5), 'a b\nc d\n', 'a b\n\nc', 0.5, 2 / 3),
    ('c4/sentences', C4(min_sentences=2), 'One is here. Two is here.', 'One is here?!', 2, 1),
    ('c4/lorem_ipsum', C4(), 'lorem is not ipsum.', 'Here Lorem ipsum.', 0, 1),
    ('c4/curly_brackets', C4(), 'a } b c.', 'a { b c.', 0, 1),
    ('refinedweb/flagged_words', RefinedWebLines(), 'w ' * 38 + '\n3 likes', 'w ' * 37 + '\n3 likes', 0.05, 2 / 39),
    ('outliers/characters', Outliers(min_characters=3), 'abc', 'ab', 3, 2),
    ('outliers/characters', Outliers(min_characters=1, max_characters=3), 'abc', 'abcd', 3, 4),
    ('outliers/byte_entropy', Outliers(min_byte_entropy=2), 'abcd', 'aabc', 2, 1.5),
    (
        'outliers/character_entropy',
        Outliers(min_character_entropy=1, max_character_entropy=2),
        'äöüß',
        'äöüßa',
        2,
        math.log2(5),
    ),
    ('code/lines', Code(max_lines=2), 'a\nb\n', 'a\nb\nc', 2, 3),
    ('code/mean_line_length', Code(max_mean_line_length=2), 'a\nbbb', 'a\nbbbb', 2, 2.5),
    ('code/line_length', Code(max_line_length=3), 'a\nbbb', 'a\nbbbb', 3, 4),
    ('code/alphanumeric', Code(), 'a===', 'a====', 0.25, 0.2),
    ('code/alphabetic', Code(), 'a=1=', 'a=1==', 0.25, 0.2),
    ('code/letters_per_token', Code(), 'abc 1', 'abcd 1 = 22', 1.5, 1),
    ('code/encoded', Code(max_encoded=64), 'x ' + 'A' * 64, 'x ' + 'A' * 65, 64, 65),
    ('code/encoded_share', Code(), 'A' * 64 + ' ' * 64, 'A' * 65 + ' ' * 64, 0.5, 65 / 129),
    ('code/generated', Code(), '\n' * 5 + 'Autogenerated', '\n' * 4 + '# AutoGenerated by x', 0, 1),
]


@pytest.mark.parametrize(('rule', 'rules', 'kept', 'removed', 'value', 'value_removed'), THRESHOLDS)
def test_both_sides_of_a_threshold(rule, rules, kept, removed, value, value_removed):
    below, above = (verdict(document, rule) for document in judge(rules, kept, removed))
    assert (below.value, above.value) == pytest.approx((value, value_removed))
    assert below.keep and not above.keep
    if rule.endswith(('gram', 'grams', 'empty')):
        return  # cannot be switched off without its column
    off = {field.name: None for field in dataclasses.fields(rules) if 'None' in str(field.type)}
    off |= {'remove_generated': False} if rule == 'code/generated' else {}
    (document,) = judge(dataclasses.replace(rules, **off), removed)
    assert verdict(document, rule).keep and verdict(document, rule).value == above.value


def test_overlaps_and_ties_of_ngrams():
    """Of an overlap no character counts twice; of n-grams that are equally frequent the first counts."""
    rules = GopherRepetition(max_top_ngrams=((2, 1.0),), max_repeated_ngrams=((5, 1.0),))
    texts = ['a ' * 12, 'a bb a bb ccc dd ccc dd', 'ccc dd ccc dd a bb a bb', 'one', '', 'aa bb cc']
    judged = judge(rules, *texts)
    assert [verdict(d, 'gopher_repetition/repeated_5_grams').value for d in judged[:2]] == [10 / 24, 0]
    tops = [verdict(d, 'gopher_repetition/top_2_gram').value for d in judged]
    assert tops == [3 * 11 / 24, 8 / 23, 12 / 23, None, None, 5 / 8]


def test_every_rule_has_a_threshold_tested():
    tested = {rule for rule, *_ in THRESHOLDS}
    others = {f'gopher_repetition/repeated_{n}_grams' for n in range(6, 11)} | {'gopher_repetition/top_4_gram'}
    assert {rule for rules in SETS for rule in rules.rules} - tested - others == {
        'outliers/compression',
        'code/licence',
    }


def test_licences_and_compression():
    code = documents(['x', 'x', 'x'])
    code = [
        dataclasses.replace(d, licence=licence) for d, licence in zip(code, ('MIT', 'GPL-3.0-only', None), strict=True)
    ]
    versions = (Code(), Code(unknown_licence_stays=True), Code(licences=None))
    keeps = [[verdict(d, 'code/licence').keep for d in Rules((rules,))(code)] for rules in versions]
    assert keeps == [[True, False, False], [True, False, True], [True, True, True]]
    noise = ''.join(random.Random(0).choices([chr(c) for c in range(0x21, 0x7F)], k=2000))
    for text, kept in ((prose(200), True), ('ab' * 1000, False), (noise, True)):
        (found,) = (verdict(d, 'outliers/compression') for d in judge(Outliers(), text))
        assert (found.keep, found.value) == (kept, len(text.encode()) / len(zlib.compress(text.encode())))


def test_lines_are_corrected():
    text = lines(
        'HOME ABOUT US now',
        'Sign in The cat sat.',
        '1,234',
        '12 likes',
        'Menu',
        '',
        'It is so. Read more...',
        prose(300),
    )
    (document,) = judge(RefinedWebLines(), text)
    assert document.text == lines('The cat sat.', '', 'It is so.', prose(300))
    words_of = [len(line.split()) for line in text.split('\n')]
    assert document.verdicts[0].value == (sum(words_of) - words_of[-1]) / sum(words_of)
    (document,) = judge(RefinedWebLines(), prose(20))
    assert document.text == prose(20)


def test_odd_documents():
    """Each has a verdict of every rule, and is done at once: the megabyte too."""
    texts = {
        '': 0,
        'word': 1,
        '\n': 0,
        '😀': 1,
        'x' * 1_000_000: 1,
        '.' * 1_000_000: 0,
        '\x0b\u2028': 0,
        '中' * 1000: 1,
    }
    for document, num_words in zip(Rules(SETS)(documents(texts)), texts.values(), strict=True):
        assert [verdict.rule for verdict in document.verdicts] == list(Rules(SETS).rules)
        assert document.removed_by is not None
        assert verdict(document, 'gopher_quality/word_count').value == num_words
    assert Rules(SETS)([]) == []
    assert Rules(())(documents(['a']))[0].text == 'a'


PARTS = ('a', 'b', 'the', 'of', 'to', 'be', '.', '\n', '-', '…', '#', '{', 'javascript', 'lorem ipsum', "don't")
some_texts = st.lists(
    st.one_of(
        st.sampled_from(synthetic_texts()),
        st.text(max_size=60),
        st.lists(st.sampled_from(PARTS), max_size=60).map(' '.join),
    ),
    max_size=12,
)


@settings(max_examples=15, deadline=None)
@given(texts=some_texts, cuts=st.lists(st.integers(0, 12), max_size=3), empty_table=st.booleans())
def test_batches_do_not_matter(texts, cuts, empty_table):
    stage = Rules(SETS, exempt=(Exempt(GopherQuality(min_words=5), sources=('other',)),))
    whole = [dataclasses.replace(d, source='other' if i % 3 else 'test') for i, d in enumerate(documents(texts))]
    expected = stage(whole)
    if empty_table:
        words.empty_table()
    bounds = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    parts = [stage(whole[a:b]) for a, b in itertools.pairwise(bounds)]
    assert [document for part in parts for document in part] == expected


def test_thresholds_for_some_documents():
    stage = Rules(
        (C4(min_sentences=1), GopherQuality(min_words=50)),
        exempt=(
            Exempt(GopherQuality(min_words=5), languages=('de', 'nl'), sources=('news',)),
            Exempt(GopherQuality(min_words=None), domains=('example.org',)),
            Exempt(C4(min_sentences=None), languages=('de',)),
        ),
    )
    text = 'one two three four five six.'
    made = [
        Document('0', text, 'news', language='de'),
        Document('1', text, 'news', language='fr'),
        Document('2', 'one two', 'news', language='de', domain='example.org'),
        Document('3', 'one two', 'x', domain='en.example.org'),
        Document('4', 'one two three.', 'x', domain='badexample.org'),
    ]
    judged = stage(made)
    assert [verdict(d, 'gopher_quality/word_count').keep for d in judged] == [True, False, False, True, False]
    assert [verdict(d, 'c4/sentences').keep for d in judged] == [True, True, True, False, True]
    assert [d.text for d in judged] == [text, text, '', '', 'one two three.']
    assert [d.id for d in judged] == ['0', '1', '2', '3', '4']


def test_a_part_of_what_a_rule_removes_stays():
    texts = ['word ' * n for n in range(10, 60)] * 40
    rules, rule = (GopherQuality(),), 'gopher_quality/word_count'

    def stay(*chances):
        return {d.id for d in Rules(rules, chances=chances)(documents(texts)) if verdict(d, rule).keep}

    without, fixed = stay(), stay(Chance(rule, ((0, 0.25),)))
    assert len(without) == 400 and without < fixed
    assert abs(len(fixed - without) - 0.25 * 1600) < 5 * math.sqrt(0.25 * 0.75 * 1600)
    assert stay(Chance(rule, ((0, 0.25),), seed=1)) != fixed == stay(Chance(rule, ((0, 0.25),)))
    assert stay(Chance('gopher_quality/stop_words', ((0, 1),))) == without
    # Rising from 0 at 20 words to 1 at 40.
    rising = Counter(int(i) % 50 + 10 for i in stay(Chance(rule, ((20, 0), (40, 1)))))
    assert not any(rising[n] for n in range(10, 21)) and all(rising[n] == 40 for n in range(40, 60))
    assert 8 <= rising[30] <= 32 and rising[24] < rising[36]


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: Rules((C4(), C4(min_sentences=1))), 'given twice'),
        (lambda: Rules((C4(),), exempt=(Exempt(GopherQuality()),)), 'replaces none'),
        (lambda: Rules((GopherRepetition(),), exempt=(Exempt(TOP_3),)), 'replaces none'),
        (lambda: Rules((C4(),), chances=(Chance('c4/sentence', ((0, 1),)),)), 'c4/sentence'),
        (lambda: Chance('c4/sentences', ((1, 0.5), (0, 1))), 'rising values'),
        (lambda: Chance('c4/sentences', ((0, 2),)), 'from 0 to 1'),
        (lambda: GopherRepetition(max_top_ngrams=((3, 0.1), (2, 0.1))), 'do not rise'),
    ],
)  # fmt: skip
def test_mistakes(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_full_table_is_emptied(monkeypatch):
    texts = synthetic_texts()
    expected = Rules(SETS)(documents(texts))
    monkeypatch.setattr(words, '_MOST_PIECES', 10)
    assert [d for text in documents(texts) for d in Rules(SETS)([text])] == expected
    assert len(words.word_table()) < len({piece for text in texts for piece in text.split()})
    words.empty_table()
    monkeypatch.setattr(words, '_MOST_CHARACTERS', 1000)
    words.word_table().numbers(['x' * 2000])
    assert len(words.word_table()) == 0
