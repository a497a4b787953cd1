"""Fine-tuned models against transformers' own: logits and loss on rows of labelled examples."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import unflatten_dict

from llm.data.labelled import LabelledExample, LabelledRows
from llm.data.vocabularies import ByteVocabulary
from llm.interop.huggingface.bert import BERT
from llm.interop.huggingface.directory import family_links
from llm.interop.huggingface.family import Family
from llm.interop.huggingface.t5 import T5
from llm.jobs.finetuned_model import finetuned_model
from llm.models.model import ModelConfig
from llm.models.parameters import named_specs, parameter_specs
from llm.training.step import make_prediction_step
from tests.models.small_encoders import D, F, H, K, bert, t5

pytestmark = pytest.mark.oracle

VOCABULARY = ByteVocabulary()
V, S, LAYERS = VOCABULARY.size, 24, 2


def parameters(family: Family, model: ModelConfig, weights: dict[str, np.ndarray]) -> dict[str, Any]:
    """Ours by the family's table, and a classifier, which belongs to no family."""
    specs = parameter_specs(model.build())
    found = {name: np.zeros(spec.shape, np.float32) for name, spec in named_specs(specs)}
    for link in family_links(family, model, {name: x for name, x in specs.items() if name != 'classifier'}):
        found[link.path][link.index] = link.read(weights[link.name])
    if 'classifier' in specs:
        found |= {'classifier/kernel': weights['classifier.weight'].T, 'classifier/bias': weights['classifier.bias']}
    return unflatten_dict(found, sep='/')


def shaken(model: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """The model, with no bias at zero and no scale at one, and its weights."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval(), {name: x.detach().numpy() for name, x in model.state_dict().items()}


def predicted(model: Any, parameters: Any, rows: LabelledRows) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
    """Logits and mean loss of all rows, and one of padding, as an evaluation has them; and the rows."""
    batch = rows.rows(range(rows.num_rows + 1))
    step = jax.jit(make_prediction_step(nnx.split(model.build())[0]))
    found = step(parameters, batch)
    real = {name: array[: rows.num_rows] for name, array in batch.items()}
    return np.asarray(found['predicted'])[: rows.num_rows], float(found['nll'] / found['tokens']), real


def examples(*pairs: Any) -> list[LabelledExample]:
    return [LabelledExample(texts, label, str(i)) for i, (texts, label) in enumerate(pairs)]


TASKS = {
    'classification': examples((('good', 'film'), 'yes'), (('ill', 'made thing'), 'no'), (('a', 'b'), 'maybe')),
    'regression': examples((('good', 'film'), '1.5'), (('ill', 'made thing'), '-2'), (('a', 'b'), '0.25')),
    'tagging': examples((('New', 'York', 'now'), ('B', 'I', 'O')), (('it',), ('O',))),
}


@pytest.mark.parametrize('task', TASKS)
def test_encoders(task):
    import torch
    import transformers

    torch.manual_seed(0)
    labels = {'classification': ('maybe', 'no', 'yes'), 'tagging': ('B', 'I', 'O')}.get(task, ())
    settings = transformers.BertConfig(
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=H,
        intermediate_size=F,
        max_position_embeddings=40,
        num_labels=len(labels) or 1,
        initializer_range=0.2,
    )
    kind = 'BertForTokenClassification' if task == 'tagging' else 'BertForSequenceClassification'
    theirs, weights = shaken(getattr(transformers, kind)(settings))

    base = dataclasses.replace(bert(vocab=V, pooler=True, next_sentence=True), compute_dtype='float32')
    model = finetuned_model(base, task, labels)
    rows = LabelledRows(TASKS[task], VOCABULARY, task, S, labels, 'first', token_types=True)
    logits, loss, batch = predicted(model, parameters(BERT, model, weights), rows)
    read = batch['loss_weights'] > 0
    targets = torch.tensor(batch['targets'])
    output = theirs(
        torch.tensor(batch['inputs']).long(),
        attention_mask=torch.tensor(batch['segment_ids']),
        token_type_ids=torch.tensor(batch['token_types']),
        labels=(
            torch.where(torch.tensor(read), targets.long(), -100)
            if task == 'tagging'
            else targets[:, 0].long()
            if task == 'classification'
            else targets[:, 0]
        ),
    )
    expected = output.logits.detach().numpy()
    expected, ours = (expected[read], logits[read]) if task == 'tagging' else (expected, logits[:, 0])
    if task != 'tagging':
        assert batch['token_types'].sum() > 0
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert loss == pytest.approx(output.loss.item(), rel=1e-4)


def test_an_encoder_decoder():
    import torch
    import transformers

    torch.manual_seed(0)
    settings = transformers.T5Config(
        vocab_size=V,
        d_model=D,
        d_kv=K,
        d_ff=F,
        num_layers=LAYERS,
        num_heads=H,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        decoder_start_token_id=VOCABULARY.pad_id,
        pad_token_id=VOCABULARY.pad_id,
        eos_token_id=VOCABULARY.eos_id,
    )
    theirs, weights = shaken(transformers.T5ForConditionalGeneration(settings))
    model = finetuned_model(t5(gated=False, vocab_size=V), 'generation', ())
    answers = examples((('What is 2 + 2?',), '4'), (('Say nothing at all, please.',), ''), (('Who?',), 'much too long'))
    rows = LabelledRows(answers, VOCABULARY, 'generation', S, (), target_length=8)
    assert rows.cut == 2  # the second text and the third answer
    logits, loss, batch = predicted(model, parameters(T5, model, weights), rows)
    read = batch['loss_weights'] > 0
    output = theirs(
        torch.tensor(batch['encoder_inputs']).long(),
        attention_mask=torch.tensor(batch['encoder_segment_ids']),
        labels=torch.where(torch.tensor(read), torch.tensor(batch['targets']).long(), -100),
    )
    expected = output.logits.detach().numpy()[read]
    np.testing.assert_allclose(logits[read], expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert loss == pytest.approx(output.loss.item(), rel=1e-4)
