import dataclasses
import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data.documents.deduplication import pipeline
from llm.data.documents.deduplication.config import Deduplication
from llm.data.documents.deduplication.near_duplicates import NearDuplicates
from llm.data.documents.deduplication.repeats import Repeats
from tests.data.documents.deduplication.prepared import rows, write_shards

CONFIG = Deduplication(
    sources=('good',),
    near=NearDuplicates(threshold=0.7, bucket=2),
    repeats=(Repeats('lines', occurrences=3, words=2), Repeats('passages', words=8)),
)


def corpus():
    """Documents that have every kind of duplicate of each other; with what becomes of each."""
    generator = random.Random(0)
    word = [''.join(letters) for letters in itertools.product('abcdefghi', repeat=4)]
    pages = [' '.join(generator.sample(word, 60)) for _ in range(8)]

    def edited(page, *places):
        words = page.split()
        for place in places:
            words[place] = 'changed'
        return ' '.join(words)

    passage = ' '.join(word[:20])
    documents = [
        {'id': 'a', 'text': pages[0] + ' longer'},
        {'id': 'a', 'text': pages[1]},  # the same id, and shorter
        {'id': 'b', 'text': pages[2], 'url': 'http://www.x.org/p?utm_source=1'},
        {'id': 'c', 'text': pages[3] + ' longer', 'url': 'https://x.org/p'},
        {'id': 'd', 'text': pages[4]},
        {'id': 'e', 'text': pages[4].upper() + '!', 'source': 'good'},
        {'id': 'f', 'text': pages[5]},
        {'id': 'g', 'text': edited(pages[5], 3)},
        {'id': 'h', 'text': edited(pages[5], 3, 57) + ' and more'},
        {'id': 'i', 'text': f'{pages[6]}\n{passage}'},
        {'id': 'j', 'text': f'{passage}\n{pages[7]}', 'source': 'good'},
        *({'id': f'k{i}', 'text': f'Home | About\n{" ".join(generator.sample(word, 40))}'} for i in range(4)),
        {'id': 'l', 'text': '', 'source': 'good'},
        {'id': 'm', 'text': ' . '},
    ]
    gone = {'a': 'id', 'b': 'url', 'd': 'document', 'f': 'near_duplicate', 'g': 'near_duplicate', 'm': 'document'}
    stays_for = {'a': 'a', 'b': 'c', 'd': 'e', 'f': 'h', 'g': 'h', 'm': 'l'}
    return documents, gone, stays_for


def outcome(output):
    """What does not depend on shards: verdicts and final texts."""
    verdicts = sorted(tuple(map(str, row.values())) for row in rows(output, 'verdicts'))
    return verdicts, sorted((row['id'], row['text'], row['source']) for row in rows(output, 'final'))


def test_each_rule_removes_what_it_is_for(tmp_path):
    documents, gone, stays_for = corpus()
    output = write_shards(tmp_path, [documents[:9], documents[9:]])
    counts = pipeline.finish(output, CONFIG, None, processes=1)
    removed = [row for row in rows(output, 'verdicts') if row['rule']]
    assert {row['id']: row['rule'] for row in removed} == gone and len(removed) == len(gone)
    assert {row['id']: row['representative'] for row in removed} == stays_for
    texts = {row['id']: row['text'] for row in rows(output, 'final')}
    assert texts['i'] == documents[9]['text'].split('\n')[0] and texts['j'] == documents[10]['text']
    assert sorted('Home' in texts[f'k{i}'] for i in range(4)) == [False, False, False, True]
    assert counts.documents == len(documents) == counts.kept + counts.removed.total() and counts.changed == 4
    lost = sum(row['characters'] - row['kept_characters'] for row in rows(output, 'verdicts'))
    assert counts.characters - counts.kept_characters == lost


@settings(max_examples=5, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 5), st.sampled_from([1 << 28, 500]))
def test_the_same_under_any_sharding_order_and_partitions(tmp_path_factory, shuffler, count, memory):
    documents, _, _ = corpus()
    base = tmp_path_factory.mktemp('base')
    pipeline.finish(write_shards(base, [documents]), CONFIG, None, processes=1)
    shuffler.shuffle(documents)
    places = [shuffler.randrange(count) for _ in documents]
    shards = [[d for d, place in zip(documents, places, strict=True) if place == i] for i in range(count)]
    other = write_shards(tmp_path_factory.mktemp('other'), shards)
    pipeline.finish(other, dataclasses.replace(CONFIG, memory_bytes=memory), None, processes=1)
    assert outcome(other) == outcome(base)
