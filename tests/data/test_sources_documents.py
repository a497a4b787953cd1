"""Counting what reading meets, and the errors it leads to."""

import dataclasses
import json

import pytest

from llm.data.sources import BadRecord, ReadCounts, empty_split_error, read_documents
from llm.data.sources.documents import MAX_SAMPLES
from llm.errors import UserError


@dataclasses.dataclass(frozen=True)
class ListShard:
    name: str
    texts: tuple[str, ...]

    def fingerprint(self):
        return ''

    def documents(self, counts):
        for text in self.texts:
            counts.add_document(len(text.encode()))
            yield text


@dataclasses.dataclass(frozen=True)
class ListSource:
    groups: tuple[tuple[str, ...], ...]

    def shards(self, split):
        return [ListShard(f'{split}/{i}', texts) for i, texts in enumerate(self.groups)]


def test_read_documents_goes_through_all_shards_in_order():
    counts = ReadCounts()
    assert list(read_documents(ListSource((('a', 'é'), (), ('c',))), 'train', counts)) == ['a', 'é', 'c']
    assert (counts.documents, counts.bytes) == (3, 4)


@pytest.mark.parametrize(('split', 'fix'), [('train', 'smaller'), ('validation', 'larger')])
def test_a_split_without_documents_is_an_error_that_says_where_they_went(split, fix):
    shards = ListSource(((),) * 5).shards(split)
    error = str(empty_split_error(split, ReadCounts(other_split=7, empty=2, skipped=1), shards))
    assert error.startswith(f'{split}/0, {split}/1, {split}/2 and 2 more: the {split} split has no documents ')
    assert '7 belong to the other split, 2 are empty, 1 are bad). Give ' in error
    assert f'{fix} validation_fraction' in error


def test_a_source_without_documents_is_an_error_that_asks_for_other_files():
    with pytest.raises(
        UserError, match=r'^validation/0, validation/1: there are no documents at all.*Give files'
    ) as it:
        list(read_documents(ListSource(((), ())), 'validation'))
    assert 'validation_fraction' not in str(it.value)


def test_merged_counts_are_the_sums_and_survive_json():
    one, other = ReadCounts(1, 2, 3, 4, 5, 6, samples=[BadRecord('a', 1, 'x')]), ReadCounts(10, 20, 30, 40, 50, 60)
    one.merge(other)
    assert dataclasses.astuple(one)[:6] == (11, 22, 33, 44, 55, 66)
    assert ReadCounts.from_dict(json.loads(json.dumps(one.as_dict()))) == one


def test_samples_are_bounded():
    counts = ReadCounts()
    for i in range(100):
        counts.add_skipped('file', i, 'broken')
    assert counts.skipped == 100
    assert [sample.record for sample in counts.samples] == list(range(MAX_SAMPLES))


def test_the_limit_names_the_record_that_passed_it():
    counts = ReadCounts(max_bad_records=2)
    counts.add_skipped('f.jsonl', 3, 'broken')
    counts.add_invalid_utf8('f.jsonl', 4, skipped=True)
    counts.add_invalid_utf8('f.jsonl', 5, skipped=False)  # replaced: not bad
    with pytest.raises(UserError, match=r'f\.jsonl:9: broken; 3 bad records, more than max_bad_records = 2'):
        counts.add_skipped('f.jsonl', 9, 'broken')


def test_the_limit_holds_for_the_sum_of_shards():
    total = ReadCounts()
    for shard in range(3):
        counts = ReadCounts(max_bad_records=2)
        counts.add_skipped(f'{shard}.jsonl', 1, 'broken')
        if shard < 2:
            total.merge(counts)
    with pytest.raises(UserError, match=r'0\.jsonl:1, among others: 3 bad records'):
        total.merge(counts)
