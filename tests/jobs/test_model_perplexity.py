"""A trained model as the scorer of a stage, against the loss that its own run had found."""

import json
import math

import numpy as np
import pyarrow.parquet
import pytest

from llm.configuration import Invocation
from llm.data.documents.document import Document
from llm.data.documents.quality.perplexity import PerplexityLimits
from llm.data.documents.sources import JsonLines
from llm.data.sources import TextFiles, read_documents
from llm.errors import UserError
from llm.jobs.model_perplexity import ModelPerplexity
from llm.jobs.prepare_data import PrepareData
from llm.parallel.mesh import MeshConfig


@pytest.mark.slow
def test_the_stage_scores_as_the_run_did_in_workers_too(tiny_run, tmp_path):
    assert tiny_run('TOTAL_STEPS = 6') == 0
    last = tiny_run.metrics('evaluation')[-1]
    texts = list(read_documents(TextFiles(str(tiny_run.corpus), validation_fraction=0.2), 'validation'))
    documents = [Document(f'{i}', text, 'test') for i, text in enumerate(texts)]
    stage = ModelPerplexity(
        run_directory=str(tiny_run.directory),
        batch_tokens=256,
        boundaries=(('', 1.0, 1e6),),
        mesh=MeshConfig(data=1),
        limits=PerplexityLimits(least=200.0),
    )
    together = stage(documents)
    values = np.array([document.metadata['model_perplexity'] for document in together])
    sizes = np.array([len(text.encode()) + 1 for text in texts])
    assert len(texts) > 3 and sizes.sum() == last['tokens']
    # Sums of fp32 losses of about as many tokens, in another order.
    np.testing.assert_allclose((np.log(values) * sizes).sum() / sizes.sum(), last['loss'], rtol=1e-6)
    assert {document.metadata['model_perplexity_bucket'] for document in together} == {'middle'}

    alone = [stage([document])[0].metadata['model_perplexity'] for document in documents[:3]]
    np.testing.assert_allclose(alone, values[:3], rtol=1e-6)
    short, cut = (
        stage([Document('x', text, 'test')])[0].metadata.get('model_perplexity') for text in ('ab', texts[0] * 2)
    )
    assert short is None and cut is not None

    (tmp_path / 'in.jsonl').write_text(''.join(json.dumps({'id': d.id, 'text': d.text}) + '\n' for d in documents))
    job = PrepareData(
        str(tmp_path / 'out'),
        (JsonLines(files=str(tmp_path / 'in.jsonl'), name='in'),),
        (stage,),
        report=None,
        processes=2,
    )
    job(Invocation(dry_run=False, operative_config='', command=(), config_files=()))
    ledger = pyarrow.parquet.read_table(tmp_path / 'out/ledger/000000.parquet').to_pylist()
    np.testing.assert_allclose([row['model_perplexity/range.value'] for row in ledger], values, rtol=1e-6)
    assert [row['removed_by'] for row in ledger] == [
        None if value >= 200 else 'model_perplexity/range' for value in values
    ]
    assert math.isclose(ledger[0]['model_perplexity/bucket.value'], 1.0)

    (tiny_run.directory / 'vocabulary/vocabulary.json').write_text('{}')
    with pytest.raises(UserError, match='does not describe a vocabulary'):
        stage.identities()
