"""Multiple choice: the same log-likelihoods and choices as transformers, by the steps of lm-evaluation-harness."""

import json

import numpy as np
import pytest

from llm.data.vocabularies.training import VocabularyConfig, train_on_sample
from llm.errors import UserError
from llm.evaluation.multiple_choice import FIGURES, ChoiceScorer, Item, MultipleChoiceSet, choice_rows, item_figures
from llm.interop.huggingface.directory import open_directory
from llm.interop.loading import load_parameters
from llm.parallel.mesh import MeshConfig, make_mesh
from llm.parallel.sharding import AxisRules
from tests.interop.huggingface import models

RECORDS = [
    {'query': 'Question: what is wet?', 'choices': ['the sea', 'a stone', ' sand in the sun '], 'gold': 0},
    {'query': ' what is it that falls from the sky when it is cold and the sun is not seen?\n', 'gold': 1}
    | {'choices': ['stones, as everybody knows', 'snow']},
    {'query': 'Où est la mer ?', 'choices': ['là', 'à côté de la forêt', 'ici', 'nulle part'], 'gold': 3},
    {'query': 'a', 'choices': ['b', 'c'], 'gold': 1},
]
LENGTH = 40


def write(path, records):
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    return str(path)


def lm_eval_scores(model, vocabulary, record, delimiter):
    """Log-likelihoods as `_encode_pair` and `_loglikelihood_tokens` of lm-evaluation-harness 0.4 come to them."""
    import torch

    scores = []
    for choice in record['choices']:
        context, continuation = record['query'].strip() + delimiter, choice.strip()
        spaces = len(context) - len(context.rstrip())
        if spaces > 0:
            continuation, context = context[-spaces:] + continuation, context[:-spaces]
        whole, head = vocabulary.encode(context + continuation), vocabulary.encode(context)
        tail = whole[len(head) :]
        tokens = ([vocabulary.bos_id] + head + tail)[-(LENGTH + 1) :]
        with torch.no_grad():
            logits = model(torch.tensor([tokens[:-1]])).logits[0]
        likelihoods = torch.log_softmax(logits, -1)[-len(tail) :]
        scores.append(likelihoods.gather(1, torch.tensor(tail)[:, None]).sum().item())
    return np.array(scores)


@pytest.mark.oracle
@pytest.mark.parametrize('delimiter', ['\nAnswer: ', '...'])
def test_log_likelihoods_and_choices_are_those_of_transformers(tmp_path, delimiter):
    texts = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
    vocabulary = train_on_sample(VocabularyConfig('byte_level_bpe', 300), texts)
    sizes = {'vocab_size': 300, 'n_positions': LENGTH, 'n_embd': 32, 'n_layer': 2, 'n_head': 4}
    oracle, directory = models.saved(models.Case('GPT2', sizes, 'LMHeadModel'))
    checkpoint, mesh = open_directory(directory), make_mesh(MeshConfig(data=1))
    parameters = load_parameters(checkpoint.pieces, checkpoint.specs, mesh, AxisRules())
    items = MultipleChoiceSet('quiz', write(tmp_path / 'quiz.jsonl', RECORDS), delimiter=delimiter).items()
    rows = choice_rows(items, vocabulary, LENGTH)
    assert any(row.cut for item in rows for row in item)
    assert len({len(row.tokens) > 32 for item in rows for row in item}) == 2  # of two widths
    scores = ChoiceScorer(checkpoint.config, mesh, tokens=96)(parameters, rows)
    theirs = [lm_eval_scores(oracle, vocabulary, record, delimiter) for record in RECORDS]
    for ours, expected in zip(scores, theirs, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4)
    figures = item_figures(items, scores)
    for name, unit in (('accuracy', lambda text: 1), ('normalized_accuracy', len)):
        chosen = [
            np.argmax([score / unit(choice.strip()) for score, choice in zip(some, record['choices'], strict=True)])
            for some, record in zip(theirs, RECORDS, strict=True)
        ]
        assert figures[name].tolist() == [float(a == b['gold']) for a, b in zip(chosen, RECORDS, strict=True)]


def test_what_an_item_is_worth():
    items = [
        Item('q', ('aaaa', 'bb', 'c'), 0, 'f:1'),
        Item('q', ('é', 'ab'), 0, 'f:2'),
        Item('q', ('a', 'b'), 1, 'f:3'),
    ]
    scores = [np.array([-6.0, -4.0, -5.0]), np.array([-3.0, -5.0]), np.array([-1.0, -1.0])]
    figures = item_figures(items, scores)
    assert list(figures) == list(FIGURES)
    assert figures['accuracy'].tolist() == [0, 1, 0]  # of equals the first
    assert figures['normalized_accuracy'].tolist() == [1, 0, 0]  # a letter of two bytes is one character
    assert figures['log_likelihood_per_byte'].tolist() == [-1.5, -1.5, -1.0]
    assert figures['margin_per_byte'].tolist() == [2.0, 1.0, 0.0]


GOOD = {'query': 'q', 'choices': ['a', 'b'], 'gold': 0}


@pytest.mark.parametrize(
    ('line', 'said'),
    [
        ('{"query": "q", "choices": ["a", "b"]}', "there is no field 'gold', but 'query', 'choices'"),
        ('[1]', "there is no field 'query', but a JSON list"),
        ('{"query": ', 'this is not JSON'),
        (json.dumps(GOOD | {'gold': 2}), "'gold' is 2, and the choices are 0 to 1"),
        (json.dumps(GOOD | {'gold': -1}), "'gold' is -1"),
        (json.dumps(GOOD | {'gold': True}), "'gold' is true, not the index of a choice"),
        (json.dumps(GOOD | {'gold': 'A'}), '\'gold\' is "A"'),
        (json.dumps(GOOD | {'choices': ['a']}), 'there is 1 choice'),
        (json.dumps(GOOD | {'choices': 'ab'}), '\'choices\' is "ab", not a list of texts'),
        (json.dumps(GOOD | {'choices': ['a', ' ']}), "'choices' is"),
        (json.dumps(GOOD | {'query': ' \n'}), '\'query\' is " \\n", not a text'),
        (json.dumps(GOOD | {'query': '\ud800'}), "'query' is"),
    ],
)
def test_a_line_that_is_no_item(tmp_path, line, said):
    path = tmp_path / 'quiz.jsonl'
    path.write_text(json.dumps(GOOD) + '\n\n' + line + '\n')
    with pytest.raises(UserError) as error:
        MultipleChoiceSet('quiz', str(path)).items()
    assert error.value.where == f'{path}:3'
    assert error.value.what.startswith(said)


def test_other_fields_counting_from_one_and_a_limit(tmp_path):
    records = [{'ctx': 'q', 'endings': ['a', 'b'], 'label': 2}] * 3
    path = write(tmp_path / 'quiz.jsonl', records)
    fields = {'context_field': 'ctx', 'choices_field': 'endings', 'answer_field': 'label'}
    items = MultipleChoiceSet('quiz', path, **fields, delimiter=' ', first_answer=1, limit=2).items()
    assert items == [Item('q ', ('a', 'b'), 1, f'{path}:{number}') for number in (1, 2)]
    (tmp_path / 'empty.jsonl').write_text('\n')
    with pytest.raises(UserError, match='no items'):
        MultipleChoiceSet('quiz', str(tmp_path / 'empty.jsonl')).items()
    with pytest.raises(UserError, match='a choice has 2 tokens, and rows have 1'):
        choice_rows(items, train_on_sample(VocabularyConfig('bytes'), []), 1)
