"""Indexes for later runs: either runner goes on from what either has written, with the same outcome."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm.data.documents.beam import Beam
from llm.data.documents.deduplication import pipeline
from llm.data.documents.deduplication.config import Deduplication
from llm.data.documents.deduplication.corpus import Index
from llm.data.documents.deduplication.decontamination import Decontamination, EvaluationSet, NgramShare
from llm.data.documents.deduplication.sorted_runs import BANDED, GROUPED, PAIRED, PLACED, read_range
from llm.data.documents.runner import run
from llm.data.documents.sources import JsonLines
from llm.data.documents.stage import Chain
from tests.data.documents.deduplication.prepared import rows
from tests.data.documents.deduplication.test_pipeline import CONFIG, corpus

RUNNER = Beam(salts=4, rounds=1, index=True)


def wrote(output: Path) -> dict[str, list[str]]:
    """What a run made of all documents, whatever its files are called."""
    return {
        kind: sorted(json.dumps(row, sort_keys=True) for row in rows(output, kind))
        for kind in ('final', 'verdicts', 'contamination')
    }


def known(output: Path) -> dict[str, Any]:
    """What an index says to later runs."""
    index = Index(output / 'deduplication', 0)
    kinds = {'id': GROUPED, 'url': GROUPED, 'document': GROUPED, 'near_duplicate': BANDED, 'lines': PLACED}
    kinds['passages'] = PLACED
    found: dict[str, Any] = {
        kind: sorted(read_range(index.runs(kind), (0, 1 << 64), dtype).tolist()) for kind, dtype in kinds.items()
    }
    for rule in ('id', 'url', 'document', 'near_duplicate', 'contamination'):
        removed = np.load(index.directory / f'removed/{rule}.npy')
        assert removed.dtype == PAIRED
        found[f'removed by {rule}'] = sorted(removed.tolist())
    base = index.record['base']
    found['ids'] = index.ids(np.arange(index.count))
    found['sets'] = [index.shingles(number).tolist() for number in range(index.count)]
    found['numbers'] = sorted(np.load(index.directory / 'number_of.npy').tolist())
    assert found['numbers'] == list(range(base, base + index.count))
    return found | {name: index.record[name] for name in ('base', 'settings')}


@pytest.mark.slow
def test_either_runner_goes_on_from_the_index_of_either(tmp_path):
    documents, _, _ = corpus()
    later = 'dghk1k3mpq'
    item = ' '.join(documents[-1]['text'].split()[20:50])
    documents += [{'id': 'r', 'text': f'{item} of a test'}, {'id': 's', 'text': f'{item} of another'}]
    (tmp_path / 'evaluation.json').write_text(json.dumps({'question': item}))
    against = Decontamination((EvaluationSet(str(tmp_path / 'evaluation.json')),), (NgramShare(),))
    parts = {
        'first': [document for document in documents if document['id'] not in later],
        'second': [document for document in documents if document['id'] in later],
        'third': [
            {'id': f'new {i}', 'text': document['text'] + ' once more' * (i % 2)}
            for i, document in enumerate(documents)
        ],
    }
    for name, some in parts.items():
        for i in range(2):
            lines = [json.dumps(document) for document in some[i::2]]
            (tmp_path / f'{name}-{i}.jsonl').write_text('\n'.join(lines))

    def made(part: str, name: str, beam: bool, *earlier: Path) -> Path:
        output = tmp_path / name
        output.mkdir()
        config: Deduplication = dataclasses.replace(CONFIG, earlier=tuple(f'{path}/deduplication' for path in earlier))
        sources = (JsonLines(files=f'{tmp_path}/{part}-*.jsonl', name='good'),)
        if beam:
            RUNNER.prepare(sources, Chain(()), output, '')
            RUNNER.finish(output, config, against)
        else:
            run(sources, Chain(()), output, settings='', processes=1, progress=False)
            pipeline.finish(output, config, against, processes=1)
        return output

    local, beam = made('first', 'local', False), made('first', 'beam', True)
    assert known(beam) == known(local) and wrote(beam) == wrote(local)
    expected = made('second', 'local-local', False, local)
    outcome, numbers = wrote(expected), known(expected)
    assert {json.loads(row)['representative'] for row in outcome['verdicts']} >= {'e', 'f'}
    for name, by_beam, earlier in ('beam-local', True, local), ('local-beam', False, beam):
        found = made('second', name, by_beam, earlier)
        assert wrote(found) == outcome and known(found) == numbers, name
    # Against two, of which the second knows the first, and what stays for a document was itself removed there.
    both = made('third', 'local-3', False, local, expected)
    found = made('third', 'beam-3', True, local, tmp_path / 'beam-local')
    assert wrote(found) == wrote(both) and known(found) == known(both)
    rules = [{row['rule'] for row in rows(output, 'verdicts')} for output in (local, expected, both)]
    assert 'contamination' in rules[0] and rules[1] >= {'document', 'near_duplicate', None}
    assert rules[2] >= {'document', 'near_duplicate', None}
