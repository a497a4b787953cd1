"""Reading labelled files: real SST-2 rows, pairs, CoNLL, and what is wrong with files that are not right."""

import gzip

import pytest

from llm.data.labelled import LabelledFiles, label_names, read_labelled
from llm.errors import UserError


def test_tables_with_headers_and_bare_quotes(dev_data):
    path = dev_data / 'eval' / 'sst2' / 'dev.tsv.gz'
    examples = read_labelled(LabelledFiles(str(path), text='{sentence}'), 'classification')
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    assert [f'{each.texts[0]}\t{each.label}' for each in examples] == lines[1:]
    assert label_names(examples, 'classification') == ('0', '1')


def test_templates_of_pairs(tmp_path):
    path = tmp_path / 'pairs.jsonl.gz'
    path.write_bytes(gzip.compress(b'{"premise": "it rains", "hypothesis": "wet", "gold": 1}\n\n'))
    files = LabelledFiles(str(path), 'Premise: {premise}', '{hypothesis}', '{gold}')
    (example,) = read_labelled(files, 'classification')
    assert (example.texts, example.label, example.where) == (('Premise: it rains', 'wet'), '1', f'{path}:1')


def test_conll(tmp_path):
    path = tmp_path / 'train.conll'
    path.write_text('-DOCSTART- -X- O O\n\nEU NNP B-ORG\nrejects VBZ O\n\n\nPeter NNP B-PER\n')
    first, second = read_labelled(LabelledFiles(str(path)), 'tagging')
    assert (first.texts, first.label) == (('EU', 'rejects'), ('B-ORG', 'O'))
    assert (second.texts, second.where) == (('Peter',), f'{path}:7')


def test_universal_dependencies(tmp_path):
    path = tmp_path / 'train.conllu'
    columns = ['_'] * 6
    rows = [('1-2', "don't", '_', '_'), ('1', 'do', 'do', 'AUX'), ('2', "n't", 'not', 'PART'), ('2.1', 'x', 'x', 'X')]
    path.write_text('# text = x\n' + ''.join('\t'.join([*row, *columns]) + '\n' for row in rows))
    (example,) = read_labelled(LabelledFiles(str(path)), 'tagging')
    assert (example.texts, example.label) == (('do', "n't"), ('AUX', 'PART'))


@pytest.mark.parametrize(
    ('name', 'content', 'task', 'message'),
    [
        ('a.jsonl', '{"text": "x"}', 'classification', r"reads 'label'.*It has text"),
        ('a.jsonl', '{"text": ["x"], "label": 1}', 'classification', r'text is neither text nor a number'),
        ('a.jsonl', '{"text": "x", "label"', 'classification', r'a\.jsonl:1.*is not JSON'),
        ('a.jsonl', '[1]', 'classification', 'is not a JSON object'),
        ('a.tsv', 'text\tlabel\nonly\n', 'classification', r'a\.tsv:2.*2 columns of the header'),
        ('a.conll', 'word\n', 'tagging', r'a\.conll:1.*1 columns'),
        ('a.conll', 'word X\n', 'classification', 'does not hold examples for classification'),
        ('a.jsonl', '{"text": "x", "label": 1}', 'tagging', 'does not hold examples for tagging'),
        ('a.jsonl', '\n', 'classification', 'hold no example'),
        ('a.tsv', 'text\tlabel\ngood\t\n', 'classification', r'a\.tsv:2.*the label is empty'),
        ('a.txt', 'x', 'classification', 'a kind that is not read'),
    ],
)
def test_what_is_wrong_is_named(tmp_path, name, content, task, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f'(?s){message}'):
        read_labelled(LabelledFiles(str(tmp_path / name)), task)


def test_templates_reach_no_attributes(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"text": "x", "label": 1}')
    with pytest.raises(UserError, match='text.__class__'):
        read_labelled(LabelledFiles(str(tmp_path / 'a.jsonl'), text='{text.__class__}'), 'classification')
