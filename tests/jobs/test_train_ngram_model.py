"""An n-gram model from text to filtered documents, and to ARPA and back, as the run files start it."""

import json
import re

import pyarrow.parquet
import pytest

from llm.data.vocabularies import ByteVocabulary
from llm.main import main
from tests.data.documents.ngram_models.made_up_text import TEXT, sentences


def start(name, **bindings) -> int:
    command = [f'--gin_file=gin_configs/runs/{name}.gin']
    return main([*command, *(f'--gin_bindings={key.replace("__", ".")}={value!r}' for key, value in bindings.items())])


@pytest.fixture
def said(capsys):
    return lambda: capsys.readouterr().err.splitlines()[-1]


def test_from_text_to_documents_in_buckets(tmp_path, capsys, said):
    texts = ['\n'.join(TEXT[i : i + 5]) for i in range(0, len(TEXT), 5)]
    (tmp_path / 'good.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    web = ['\n'.join(sentences(6, seed)) for seed in range(50, 60)] + ['zzz qqq ' * 40]
    for part in range(2):
        lines = [json.dumps({'id': f'{i}', 'text': text}) + '\n' for i, text in enumerate(web)][part::2]
        (tmp_path / f'web{part}.jsonl').write_text(''.join(lines))
    model = str(tmp_path / 'model')
    train = {'FILES': str(tmp_path / 'good.jsonl'), 'HELD_OUT_FRACTION': 0.3, 'OUTPUT_DIRECTORY': model, 'ORDER': 3}
    for _ in range(2):  # the second time it is there
        assert start('train_ngram_model', **train) == 0
        printed = capsys.readouterr().out
        assert re.search(r'perplexity of \d\d held-out documents', printed) and 'warning' not in printed
    assert start('train_ngram_model', **{**train, 'ORDER': 4}) == 2
    assert 'order' in said()
    few = {'HELD_OUT_FRACTION': 0.05, 'OUTPUT_DIRECTORY': str(tmp_path / 'few'), 'ORDER': 2}
    assert start('train_ngram_model', **{**train, **few}) == 0
    assert re.search(r'warning: only \d+ held-out documents are long enough', capsys.readouterr().out)

    prepare = {
        'FILES': str(tmp_path / 'web*.jsonl'),
        'MODEL': model,
        'OUTPUT_DIRECTORY': str(tmp_path / 'out'),
        'LANGUAGES': (),
        'language__Language__threshold': 0.0,
        'prepare_data__PrepareData__processes': 1,
    }
    assert start('prepare_by_perplexity', **prepare, prepare_data__PrepareData__stages=()) == 2
    assert 'Write prepare_data.PrepareData.stages = @language.Language()' in said()
    assert start('prepare_by_perplexity', **prepare) == 0
    rows = [
        row for path in sorted(tmp_path.glob('out/ledger/*')) for row in pyarrow.parquet.read_table(path).to_pylist()
    ]
    assert len(rows) == 11 and {row['removed_by'] for row in rows if row['id'] == '10'} == {'perplexity/bucket'}
    kept = [row for path in tmp_path.glob('out/documents/*') for row in pyarrow.parquet.read_table(path).to_pylist()]
    assert kept and all(json.loads(row['metadata'])['perplexity_bucket'] in ('head', 'middle') for row in kept)


def test_arpa_there_and_back_and_mistakes(tmp_path, said):
    text, model = tmp_path / 'good.txt', tmp_path / 'model'
    text.write_text('\n'.join(TEXT))
    ByteVocabulary().save(tmp_path / 'bytes')
    train = {'FILES': str(text), 'OUTPUT_DIRECTORY': str(model), 'ORDER': 2}
    held_out = {'train_ngram_model.TrainNgramModel.held_out': False}

    def trained(**bindings) -> int:
        return start('train_ngram_model', **{**train, **held_out, **bindings})

    assert trained(VOCABULARY=str(tmp_path / 'bytes')) == 2
    assert "does not go with tokens of kind 'words'" in said()
    assert trained(KIND='vocabulary', VOCABULARY=str(tmp_path / 'none')) == 2
    assert 'no vocabulary is here' in said()
    assert trained(KIND='word') == 2
    assert "'word'" in said()
    (tmp_path / 'blank.txt').write_text('... !\n')
    assert trained(FILES=str(tmp_path / 'blank.txt'), OUTPUT_DIRECTORY=str(tmp_path / 'blank')) == 2
    assert 'there is no text to estimate an n-gram model from' in said()
    assert trained() == 0

    arpa, again = tmp_path / 'model.arpa', tmp_path / 'again'
    assert start('convert_ngram_model', SOURCE=str(model), OUTPUT=str(arpa)) == 0
    assert start('convert_ngram_model', SOURCE=str(arpa), OUTPUT=str(again), KIND='words') == 0
    assert start('convert_ngram_model', SOURCE=str(again), OUTPUT=str(tmp_path / 'again.arpa')) == 0
    assert sorted((tmp_path / 'again.arpa').open()) == sorted(arpa.open())
    assert start('convert_ngram_model', SOURCE=str(arpa), OUTPUT=str(again)) == 2
    assert 'is there already' in said()
    assert start('convert_ngram_model', SOURCE=str(text), OUTPUT=str(tmp_path / 'x')) == 2
    assert said().startswith(f'error: {text}:1: is not \\data\\')

    (tmp_path / 'web.jsonl').write_text('{"text": "a"}\n')
    prepare = {'FILES': str(tmp_path / 'web.jsonl'), 'OUTPUT_DIRECTORY': str(tmp_path / 'out')}
    assert start('prepare_by_perplexity', **prepare, MODEL=str(tmp_path / 'bytes')) == 2
    assert 'this is not the directory of an n-gram model' in said()
    table = (model / 'ngrams_2.npy').read_bytes()
    (model / 'ngrams_2.npy').write_bytes(table[:-16] + bytes(16))
    assert start('prepare_by_perplexity', **prepare, MODEL=str(model)) == 2
    assert 'ngrams_2.npy: is not the file that ngram_model.json was written with' in said()
