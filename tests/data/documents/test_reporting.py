"""Pieces of the report on prepared documents that are exact: bars, counts by name, differences, numbers of tokens."""

import itertools
import re
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from llm.data.documents.bounds import Bounds
from llm.data.documents.document import Document
from llm.data.documents.reporting.clusters import find_clusters
from llm.data.documents.reporting.config import DataReport
from llm.data.documents.reporting.counting import Groups, Histogram
from llm.data.documents.reporting.duplicates import Duplicates, differences
from llm.data.documents.reporting.ledger import Ledger
from llm.data.documents.tokens import TokenCount
from llm.data.vocabularies import ByteVocabulary
from llm.errors import UserError
from llm.evaluation.reports.prepared_data.histogram import histogram as drawn


@pytest.mark.parametrize(
    ('values', 'least', 'most', 'scale'),
    [
        (np.arange(30) % 9, 3, 7, 'linear'),  # whole numbers
        (np.arange(30) % 9, None, 0, 'linear'),
        (np.linspace(0, 0.5, 2001), None, 0.3, 'linear'),
        (np.linspace(0, 0.5, 2001), 0.1, None, 'linear'),
        (np.geomspace(1, 1e6, 999), 50, 100_000, 'log'),
        (np.append(np.zeros(900), np.geomspace(1, 1e6, 99)), None, 0, 'log'),
        (np.append(np.zeros(900), np.geomspace(1, 1e6, 99)), 0, 100, 'log'),
    ],
)
def test_bars_count_what_is_between_their_edges_and_no_bar_is_on_both_sides_of_a_bound(values, least, most, scale):
    values = np.append(values, [limit for limit in (least, most) if limit is not None]).astype(np.float32)
    judged_by = Bounds('rule', least, most)
    keep = judged_by.keep(values)
    exact = judged_by.keep(values.astype(np.float64))
    assert [judged_by.keeps(value) for value in [*values.tolist(), None]] == [*exact.tolist(), True]
    bounds = [[] if limit is None else [limit] for limit in (least, most)]
    histogram = Histogram(values, *bounds)
    histogram.add(np.append(values, np.float32(np.nan)), np.append(keep, True))
    figure = histogram.as_json()
    assert figure['scale'] == scale and figure['without_figure'] == [1, 0]
    page = drawn(figure, 'rule')
    assert page.count('class="bound"') == sum(map(len, bounds))
    bars = re.findall(r'class="(zone|kept|gone)" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', page)
    zones = [(float(x), float(x) + float(width)) for kind, x, width in bars if kind == 'zone']
    assert len(zones) == sum(map(len, bounds))
    for kind, x, width in bars:  # those of what goes, and no others, are where the ground is shaded
        middle = float(x) + float(width) / 2
        assert kind == 'zone' or (kind == 'gone') == any(start < middle < end for start, end in zones)
    kept, removed = np.array(figure['kept']), np.array(figure['removed'])
    assert (kept.sum(), removed.sum()) == (keep.sum(), (~keep).sum()) and not (kept * removed).any()
    edges = [-np.inf, *figure['edges'], np.inf]
    for i, (start, end) in enumerate(itertools.pairwise(edges)):
        inside = (values > start) & (values < end)  # those on an edge are on one of its two sides
        on = np.isclose(values, start, 1e-5) | np.isclose(values, end, 1e-5)
        assert (inside & ~on).sum() <= kept[i] + removed[i] <= (inside | on).sum()


def test_of_too_many_names_the_frequent_ones_are_counted():
    groups = Groups(2, 2)  # of documents and characters: the short documents of one name are many
    for start in range(0, 60_000, 500):
        names = pyarrow.array(['often', None, *map(str, range(start, start + 500))])
        numbers = groups.numbers(names)
        groups.add(numbers, 1, 0, weights=np.ones(len(names)))
        groups.add(numbers[2:], 0, 1, weights=np.full(500, 1000))
    assert groups.pruned and len(groups) <= 20_502
    found = [(name, counts.tolist()) for name, counts in groups.items(2)]
    assert found == [('often', [[0, 0], [120, 0]]), ('unknown', [[0, 0], [120, 0]])]


def test_groups_of_duplicates_are_ranked_by_all_their_members(tmp_path):
    rules = ('id', 'near_duplicate')
    ledger = SimpleNamespace(
        final_rules=rules, all_rules=('language', *rules), directory=tmp_path, batches=lambda *_, **__: ()
    )
    groups = Duplicates(ledger, DataReport(duplicates=1))
    representatives = pyarrow.array(['small', 'large', 'large', None])
    groups.add(SimpleNamespace(outcomes=np.array([1, 2, 2, 3]), representatives=representatives))
    assert [(group['id'], group['rules']) for group in groups.as_json()] == [('large', {'near_duplicate': 2})]


def test_differences_join_to_the_texts_and_leave_out_what_is_equal_far_from_them():
    words = [f'w{i} ' for i in range(100)]
    first, second = ''.join(words), ''.join([*words[:50], 'new ', *words[51:]])
    assert differences(first, second) == [
        ['left_out', '38'],
        ['equal', ''.join(words[38:50])],
        ['changed', 'w50 ', 'new '],
        ['equal', ''.join(words[51:63])],
        ['left_out', '37'],
    ]
    assert differences('a b', 'a  b c') == [['equal', 'a b'], ['changed', '', 'c']]


def test_tokens_are_counted_and_bounded(tmp_path):
    ByteVocabulary().save(tmp_path)
    stage = TokenCount(str(tmp_path), least=2, most=4)
    judged = stage([Document('x', text, 's') for text in ('', 'ab', 'äöü', 'äö')])
    assert [(d.verdicts[0].value, d.verdicts[0].keep) for d in judged] == [(0, False), (2, True), (6, False), (4, True)]
    assert stage.identities() == [ByteVocabulary().digest]
    with pytest.raises(UserError, match='above most'):
        TokenCount('x', least=2, most=1)


@pytest.mark.parametrize('text', ['one two', '12 34', ''])
def test_copies_of_one_text_are_one_cluster_or_none(text):
    documents = [{'excerpt': text, 'removed_by': None, 'source': 's'}] * 40
    found = find_clusters(documents, DataReport())
    assert found is None if text != 'one two' else found['clusters'][0]['documents'] == 40


def test_of_a_large_ledger_whole_files_of_each_source_are_read(tmp_path):
    (tmp_path / 'ledger').mkdir()
    (tmp_path / 'summary.json').write_text('{}')
    for i in range(12):
        rows = pyarrow.table({'source': ['large' if i else 'small'] * 10, 'id': [f'{i}:{j}' for j in range(10)]})
        pyarrow.parquet.write_table(rows, tmp_path / f'ledger/{i:06d}.parquet')
    assert Ledger(tmp_path).chosen == Ledger(tmp_path, 120).chosen == list(range(12))
    some = Ledger(tmp_path, 49).chosen
    assert len(some) == 4 and some[0] == 0 and some == Ledger(tmp_path, 49).chosen
    assert len(Ledger(tmp_path, 1).chosen) == 2


@pytest.mark.parametrize(
    ('lose', 'message'),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), 'cannot be read'),
        (lambda path: path.unlink(), 'cannot be read'),
        (lambda path: pyarrow.parquet.write_table(pyarrow.parquet.read_table(path)[1:], path), 'has 1 documents'),
    ],
)
def test_documents_lost_since_the_run_are_noticed(tmp_path, lose, message):
    (tmp_path / 'summary.json').write_text('{}')
    for folder, columns in (('ledger', {'removed_by': [None, 'rule', None]}), ('documents', {'text': ['a', 'b']})):
        (tmp_path / folder).mkdir()
        for i in range(2):
            pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / folder / f'{i}.parquet')
    Ledger(tmp_path).check_documents()
    lose(tmp_path / 'documents/1.parquet')
    with pytest.raises(UserError, match=message) as error:
        Ledger(tmp_path).check_documents()
    assert error.value.where == str(tmp_path / 'documents/1.parquet')
