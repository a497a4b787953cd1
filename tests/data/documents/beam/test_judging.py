"""Documents that end, hang or fail their process are found by Beam as by the runner of one machine."""

import json

import pyarrow.parquet
import pytest

from llm.data.documents.beam import Beam
from llm.data.documents.runner import run
from llm.data.documents.sources import JsonLines
from llm.data.documents.stage import Chain
from tests.data.documents.stages import Poisoned


@pytest.mark.parametrize(('orders', 'seconds'), [(('kill', 'exit', 'fail', 'crowd', 'crowd'), 60.0), (('hang',), 3.0)])
def test_the_same_documents_are_quarantined_for_the_same_reasons(tmp_path, orders, seconds):
    texts = [f'text {i}' for i in range(40)]
    for i, order in enumerate(orders):
        texts[7 * i + 3] = order
    (tmp_path / 'made.jsonl').write_text('\n'.join(json.dumps({'id': f'{i}', 'text': t}) for i, t in enumerate(texts)))
    source, chain = JsonLines(files=str(tmp_path / 'made.jsonl'), name='made'), Chain((Poisoned(),))
    one, other = tmp_path / 'one', tmp_path / 'beam'
    expected = run([source], chain, one, settings='', processes=2, seconds_per_batch=seconds, progress=False)
    found = Beam().prepare([source], chain, other, '', seconds)
    assert found.counts == expected.counts and found.counts.quarantined == sum(order != 'crowd' for order in orders)
    for kind in ('documents', 'ledger'):
        rows = [
            [row for path in sorted((root / kind).iterdir()) for row in pyarrow.parquet.read_table(path).to_pylist()]
            for root in (one, other)
        ]
        assert rows[0] == rows[1] and len(rows[0]) in (40 - found.counts.quarantined, found.counts.kept)
    lines = [
        [json.loads(line) for path in sorted((root / 'quarantine').iterdir()) for line in path.open()]
        for root in (one, other)
    ]
    for some in lines:
        assert len(some) == found.counts.quarantined
    assert lines[0] == lines[1]
