import itertools

import numpy as np
import pytest

from llm.data.documents.deduplication import corpus
from llm.data.documents.deduplication.corpus import merge_shards, parquet_rows, preference, sort_shard
from tests.data.documents.deduplication.prepared import write_shards

ROW = {'source': 'a', 'date': '2024-05-01', 'text': 'text'}


@pytest.mark.parametrize(
    ('rule', 'better', 'worse'),
    [
        ('longest', {'text': 'longer'}, {'text': 'long'}),
        ('shortest', {'text': 'long'}, {'text': 'longer'}),
        ('oldest', {'date': '2024-05-01T12:00:00+02:00'}, {'date': '2024-05-01T11:00:00Z'}),
        ('oldest', {'date': '2024-05-01'}, {'date': None}),
        ('newest', {'date': '2024-05-02'}, {'date': '2024-05-01'}),
        ('newest', {'date': '2024-05-02'}, {'date': 'yesterday'}),
        ('longest', {'source': 'b', 'text': ''}, {'source': 'a'}),
        ('longest', {'source': 'a'}, {'source': 'other', 'text': 'longer'}),
    ],
)
def test_smaller_is_preferred(rule, better, worse):
    first, second = (preference((rule,), ('b', 'a'), ROW | fields) for fields in (better, worse))
    assert first < second


def test_documents_are_numbered_in_order_of_preference_and_id_however_many_shards_are_merged(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, '_FAN_IN', 2)
    names = [''.join(letters) for letters in itertools.product('bca', repeat=3)]
    documents = [{'id': name, 'text': name[0] * len(name.rstrip('a'))} for name in names]
    shards = [documents[i::7] for i in range(7)]
    output = write_shards(tmp_path, shards)
    paths = sorted((output / 'documents').glob('*'))
    firsts = [0, *itertools.accumulate(map(len, shards))]
    files = [tmp_path / f'{i}.arrow' for i in range(7)]
    for path, first, file in zip(paths, firsts, files, strict=False):
        sort_shard(path, first, file, ('longest',), ())
    merge_shards(files, tmp_path, len(documents), base=100, rules=1)
    assert not (tmp_path / 'order').exists()  # what is merged on the way lies in work/, which goes at the end
    (tmp_path / 'index.json').write_text('{"rows": %s, "base": 100, "earlier": []}' % [len(shard) for shard in shards])
    index = corpus.Index(tmp_path, 100)
    expected = sorted(documents, key=lambda document: (-len(document['text']), document['id']))
    numbers = {
        d['id']: n for i, shard in enumerate(shards) for d, n in zip(shard, index.numbers(i).tolist(), strict=True)
    }
    assert [numbers[document['id']] for document in expected] == list(range(100, 127))
    assert index.ids(index.numbers(3)[:0]) == []
    assert index.ids(100 + np.array([0, 5, 26])) == [expected[i]['id'] for i in (0, 5, 26)]
    assert [row for batch in parquet_rows(paths[0], ('id',)) for row in batch['id']] == [d['id'] for d in shards[0]]
