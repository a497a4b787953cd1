import dataclasses
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data.documents.deduplication import pipeline
from llm.data.documents.deduplication.config import Deduplication
from llm.data.documents.deduplication.decontamination import CommonNgrams, Decontamination, EvaluationSet
from llm.data.documents.deduplication.near_duplicates import NearDuplicates
from llm.data.documents.deduplication.repeats import Repeats
from llm.errors import UserError
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
    pages = [' '.join(generator.sample(word, 60)) for _ in range(10)]

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
        *(
            {'id': f'k{i}', 'text': f'Home | About\n{" ".join(generator.sample(word, 40))}', 'url': 'n/a'}
            for i in range(4)
        ),
        {'id': 'l', 'text': '', 'source': 'good'},
        {'id': 'm', 'text': ' . '},
        {'id': 'n', 'text': pages[8] + ' longer', 'url': 'https://x.org/n'},
        {'id': 'o', 'text': pages[9], 'url': 'https://x.org/n'},  # goes for n, which goes for p
        {'id': 'p', 'text': edited(pages[8], 30) + ' longer than n'},
        {'id': 'q', 'text': pages[2]},  # as b, which is no longer there when texts are compared
    ]
    near = dict.fromkeys('fgn', 'near_duplicate')
    gone = {'a': 'id', 'b': 'url', 'd': 'document', 'm': 'document', 'o': 'url', **near}
    stays_for = {'a': 'a', 'b': 'c', 'd': 'e', 'f': 'h', 'g': 'h', 'm': 'l', 'n': 'p', 'o': 'p'}
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

    # Files that count their records anew, and another source's names, lose nothing unless it is asked for.
    counted = [{'id': '1', 'text': 'one'}, {'id': 'x', 'text': 'two'}, {'id': 'x', 'text': 'three', 'source': 's'}]
    other = write_shards(tmp_path / 'counted', [counted, [{'id': '1', 'text': 'four'}]])
    assert pipeline.finish(other, CONFIG, None, processes=1).kept == 4
    assert pipeline.finish(other, dataclasses.replace(CONFIG, ids='all'), None, processes=1).removed == {'id': 2}

    # Documents that share bands are alike only where their sets are.
    strict = dataclasses.replace(CONFIG, near=NearDuplicates(threshold=0.99))
    assert pipeline.finish(output, strict, None, processes=1).removed['near_duplicate'] == 0


@pytest.fixture(scope='module')
def expected(tmp_path_factory):
    output = write_shards(tmp_path_factory.mktemp('base'), [corpus()[0]])
    pipeline.finish(output, CONFIG, None, processes=1)
    return outcome(output)


@settings(max_examples=4, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 5), st.sampled_from([1 << 28, 500]))
def test_the_same_under_any_sharding_order_and_partitions(tmp_path_factory, expected, shuffler, count, memory):
    documents, _, _ = corpus()
    shuffler.shuffle(documents)
    places = [shuffler.randrange(count) for _ in documents]
    shards = [[d for d, place in zip(documents, places, strict=True) if place == i] for i in range(count)]
    other = write_shards(tmp_path_factory.mktemp('other'), shards)
    pipeline.finish(other, dataclasses.replace(CONFIG, memory_bytes=memory), None, processes=1)
    assert outcome(other) == expected


def test_a_later_run_against_the_index_of_an_earlier_one_is_as_both_together(tmp_path):
    # Of lines that are there three times, the earlier run cannot know the third.
    pairwise = dataclasses.replace(CONFIG, repeats=(Repeats('passages', words=8),))
    documents, _, _ = corpus()
    first = [document for document in documents if document['id'] not in 'dghk1k3mpq']
    second = [document for document in documents if document['id'] in 'dghk1k3mpq']
    earlier = write_shards(tmp_path / 'first', [first[:4], first[4:]])
    pipeline.finish(earlier, pairwise, None, processes=1)
    later = write_shards(tmp_path / 'second', [second])
    config = dataclasses.replace(pairwise, earlier=(str(earlier / 'deduplication'),))
    pipeline.finish(later, config, None, processes=1)
    # Both together, where all of the first are preferred.
    together = [
        *({**document, 'source': f'a {document.get("source", "texts")}'} for document in first),
        *({**document, 'source': f'b {document.get("source", "texts")}'} for document in second),
    ]
    whole = write_shards(tmp_path / 'whole', [together])
    order = ('a good', 'a texts', 'b good', 'b texts')
    pipeline.finish(whole, dataclasses.replace(pairwise, sources=order), None, processes=1)
    texts = sorted((row['id'], row['text']) for output in (earlier, later) for row in rows(output, 'final'))
    assert texts == sorted((row['id'], row['text']) for row in rows(whole, 'final'))
    verdicts = [
        sorted(
            (row['id'], str(row['rule']), str(row['representative']))
            for output in some
            for row in rows(output, 'verdicts')
        )
        for some in ((earlier, later), (whole,))
    ]
    assert verdicts[0] == verdicts[1]
    third = write_shards(tmp_path / 'third', [first])
    indexes = (config.earlier[0], str(later / 'deduplication'))
    counts = pipeline.finish(third, dataclasses.replace(pairwise, earlier=indexes), None, processes=1)
    assert counts.kept == 0
    # Against two runs that knew nothing of each other.
    alone = write_shards(tmp_path / 'alone', [second])
    pipeline.finish(alone, pairwise, None, processes=1)
    new = write_shards(tmp_path / 'new', [[{'id': f'new {d["id"]}', 'text': d['text']} for d in (*first, *second)]])
    both = (config.earlier[0], str(alone / 'deduplication'))
    pipeline.finish(new, dataclasses.replace(pairwise, earlier=both), None, processes=1)
    found = {row['id'].removeprefix('new '): row['representative'] for row in rows(new, 'verdicts')}
    assert found.items() >= {**{name: name for name in 'cefhijlq'}, 'd': 'e', 'g': 'h', 'n': 'n'}.items()
    for mistake, said in (
        ({'earlier': indexes[1:]}, 'against other earlier runs'),
        ({'earlier': config.earlier, 'near': NearDuplicates(seed=7)}, 'another near'),
        ({'earlier': (str(tmp_path),)}, 'no index'),
    ):
        with pytest.raises(UserError, match=said):
            pipeline.finish(third, dataclasses.replace(pairwise, **mistake), None, processes=1)


def test_a_stopped_run_goes_on_in_processes_and_other_settings_start_anew(tmp_path, expected, monkeypatch):
    documents, _, _ = corpus()
    shards = [documents[:9], documents[9:]]
    output = write_shards(tmp_path, shards)
    real = pipeline.connected

    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, 'connected', stopped)
    with pytest.raises(KeyboardInterrupt):
        pipeline.finish(output, CONFIG, None, processes=1)
    monkeypatch.setattr(pipeline, 'connected', real)
    scanned = (output / 'deduplication/runs/id/000000-0.npy').stat().st_mtime_ns
    pipeline.finish(output, CONFIG, None, processes=2)
    assert outcome(output) == expected
    assert (output / 'deduplication/runs/id/000000-0.npy').stat().st_mtime_ns == scanned
    (output / 'final/000001.parquet').unlink()
    pipeline.finish(output, CONFIG, None, processes=1)
    assert outcome(output) == expected
    pipeline.finish(output, dataclasses.replace(CONFIG, urls=False), None, processes=1)
    assert {row['id']: row['rule'] for row in rows(output, 'verdicts')}['b'] is None
    assert not list(tmp_path.glob('**/*.tmp'))


def test_contaminated_documents_are_cut_or_go_and_every_hit_is_listed(tmp_path):
    documents, _, _ = corpus()
    words = documents[0]['text'].split()
    question, phrase = ' '.join(words[:14]), ' '.join(words[20:34])
    (tmp_path / 'quiz.jsonl').write_text(f'{{"q": "{question}"}}\n{{"q": "{phrase}"}}\n')
    long = 'so it goes on. ' * 40
    texts = [f'{long}{question}. {long}', question, *(f'{phrase} {i} {long}' for i in 'abc')]
    output = write_shards(
        tmp_path, [[{'id': f'd{i}', 'text': text} for i, text in enumerate(texts)], [{'id': 'e', 'text': 'x'}]]
    )
    against = Decontamination((EvaluationSet(str(tmp_path / 'quiz.jsonl')),), (CommonNgrams(most_documents=2),))
    counts = pipeline.finish(output, None, against, processes=1)
    assert (counts.kept, dict(counts.removed), counts.changed) == (5, {'contamination': 1}, 1)
    verdicts = {row['id']: row for row in rows(output, 'verdicts')}
    assert (verdicts['d1']['rule'], verdicts['d1']['representative']) == ('contamination', 'quiz:1')
    assert verdicts['d0']['characters'] - verdicts['d0']['kept_characters'] >= len(question) + 400
    hits = rows(output, 'contamination')
    assert [(hit['id'], hit['item']) for hit in hits] == [('d0', 'quiz:1')] * 2 + [('d1', 'quiz:1')] * 2
    assert [hit['text'] for hit in hits[2:]] == [' '.join(words[:13]), ' '.join(words[1:14])]
