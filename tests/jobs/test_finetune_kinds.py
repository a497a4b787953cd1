"""The finetune job on encoders and encoder-decoders, and of embeddings; and the mistakes that it names."""

import dataclasses
import json

import numpy as np
import pytest

from llm.configuration import Invocation, render
from llm.data.labelled import LabelledFiles
from llm.errors import UserError
from llm.inference.generation import Generator
from llm.inference.sampling import SamplingConfig
from llm.jobs.finetune import Finetune
from llm.jobs.pretrain import Pretrain
from llm.jobs.scoring_labels import AnswersConfig
from llm.jobs.trained_model import open_trained_model
from llm.models.low_rank import LowRankConfig
from llm.models.parameters import named_specs
from llm.models.pooling import PoolingConfig
from llm.parallel.mesh import make_mesh
from llm.parallel.sharding import AxisRules
from llm.training.checkpoints import CheckpointConfig, Checkpointer
from llm.training.contrastive import ContrastiveConfig
from llm.training.loop import LoopConfig
from llm.training.metrics import read_metrics
from llm.training.optimizers import OptimizerConfig
from llm.training.schedules import ScheduleConfig
from llm.training.step import StepConfig
from llm.training.trainer import Trainer
from tests.jobs.test_finetune import _records
from tests.jobs.test_generate import ONE_DEVICE, RUN, VOCABULARY, pretrain
from tests.models.small_decoders import decoder_config
from tests.models.small_encoders import bert, t5


def write_base(directory, model):
    """A run directory as pretrain leaves it, with parameters as they begin."""
    job: Pretrain = dataclasses.replace(pretrain(directory), model=model)
    directory.mkdir()
    (directory / 'config.gin').write_text(render(job))
    VOCABULARY.save(directory / 'vocabulary')
    with Checkpointer(directory / 'checkpoints', CheckpointConfig(asynchronous=False)) as checkpointer:
        trainer = Trainer(job.model, job.optimizer, StepConfig(8, 32), 20, ONE_DEVICE)
        checkpointer.save(10, trainer.state_dict(trainer.fresh_state()), {'vocabulary': VOCABULARY.digest})
    return directory


@pytest.fixture(scope='module')
def encoder(tmp_path_factory):
    model = bert(1, vocab=VOCABULARY.size + 1, token_types=0)
    return write_base(tmp_path_factory.mktemp('runs') / 'encoder', model)


@pytest.fixture(scope='module')
def encoder_decoder(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp('runs') / 'both', t5(1, vocab_size=VOCABULARY.size))


@pytest.fixture(autouse=True)
def _no_compilation_cache(monkeypatch, tmp_path):
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'compiled'))


def finetune(tmp_path, base, task, files, steps=60, **settings):
    return Finetune(
        str(tmp_path / 'run'),
        str(base),
        task,
        *files,
        OptimizerConfig(learning_rate=1e-2, schedule=ScheduleConfig('constant'), weight_decay=0.0),
        StepConfig(batch_size=16, sequence_length=16),
        LoopConfig(steps, evaluate_first=True),
        mesh=ONE_DEVICE,
        **{'checkpoint': CheckpointConfig(save_every=steps), **settings},
    )


def labelled(tmp_path, task):
    return [
        LabelledFiles(str(_records(tmp_path / f'{split}.jsonl', task, count, seed)))
        for seed, (split, count) in enumerate((('train', 64), ('validation', 20)))
    ]


def scores(directory):
    return [line for line in read_metrics(directory) if line['kind'] == 'evaluation']


def test_an_encoder_classifies_by_adapters_and_leaves_its_base_as_it_is(tmp_path, encoder):
    files = labelled(tmp_path, 'classification')
    job = finetune(tmp_path, encoder, 'classification', files, low_rank=LowRankConfig(rank=4))
    assert job(RUN) == 0
    before, after = (line['accuracy'] for line in scores(tmp_path / 'run'))
    assert after > 0.95 > before
    model = open_trained_model(tmp_path / 'run')
    assert (model.config.num_outputs, model.config.pooler, model.pooling) == (2, True, None)
    mesh = make_mesh(ONE_DEVICE)
    found = dict(named_specs(model.restore(mesh, AxisRules()).state))
    base = dict(named_specs(open_trained_model(encoder).restore(mesh, AxisRules()).state))
    kept = {name.removesuffix('/base'): value for name, value in found.items() if name.removesuffix('/base') in base}
    assert base.keys() - kept.keys() == {name for name in base if name.startswith('head/')}
    for name, value in kept.items():
        np.testing.assert_array_equal(value, base[name], err_msg=name)
    # What the base does not have is trained as it is.
    assert {name for name in found if name.startswith(('classifier', 'pooler'))} == {
        *('classifier/kernel', 'classifier/bias', 'pooler/dense', 'pooler/bias')
    }
    assert np.any(found['classifier/bias']) and np.any(found['pooler/bias'])


def test_an_encoder_decoder_answers_and_stops_at_strings(tmp_path, encoder_decoder):
    files = labelled(tmp_path, 'generation')
    # Answers are 'yes' and 'no', and end before an 's'.
    answers = AnswersConfig(examples=20, max_new_tokens=8, stop=('s',), pattern='(ye|no)')
    job = finetune(tmp_path, encoder_decoder, 'generation', files, answers=answers, target_length=6)
    assert job(RUN) == 0
    assert scores(tmp_path / 'run')[-1]['answer_accuracy'] > 0.95
    said = {json.loads(line)['predicted'] for line in (tmp_path / 'run' / 'predictions.jsonl').read_text().splitlines()}
    assert said == {'ye', 'no'}


def pairs(path, seed, count=48):
    """Words in upper case belong to the same in lower case, which have no token in common with them."""
    generator = np.random.default_rng(seed)
    words = [''.join('abc'[i] for i in generator.integers(0, 3, 4)) for _ in range(count)]
    path.write_text(''.join(json.dumps({'query': word.upper(), 'positive': word}) + '\n' for word in words))
    return LabelledFiles(str(path), '{query}', '{positive}', None)


def test_an_embedding_learns_what_belongs_together(tmp_path, encoder):
    files = [pairs(tmp_path / 'train.jsonl', 0, 400), pairs(tmp_path / 'validation.jsonl', 1, 20)]
    checkpoint = CheckpointConfig(save_every=80, keep_best=1, best_metric='validation/recall_at_1', best_mode='max')
    pooling = PoolingConfig('mean', normalize=True)
    job = finetune(tmp_path, encoder, 'embedding', files, 80, checkpoint=checkpoint, contrastive=ContrastiveConfig(0.1))
    job = dataclasses.replace(job, step=dataclasses.replace(job.step, gradient_accumulation=2))
    assert job(RUN) == 0
    before, after = scores(tmp_path / 'run')
    assert before['recall_at_1'] < 0.3
    assert 0.8 < after['recall_at_1'] <= after['mrr']
    lines = [json.loads(line) for line in (tmp_path / 'run' / 'predictions.jsonl').read_text().splitlines()]
    assert sum(line['rank'] == 1 for line in lines) / 20 == after['recall_at_1']
    model = open_trained_model(tmp_path / 'run')
    assert (model.pooling, model.config.num_outputs) == (pooling, 0)


def refused(tmp_path, base, message, **changes):
    files = [pairs(tmp_path / 'train.jsonl', 0), pairs(tmp_path / 'validation.jsonl', 1)]
    job = finetune(tmp_path, base, 'embedding', files, 2)
    dry = Invocation(dry_run=True, operative_config='', command=(), config_files=())
    with pytest.raises(UserError, match=f'(?s){message}'):
        dataclasses.replace(job, **changes)(dry)


def test_mistakes_are_named(tmp_path, encoder, encoder_decoder):
    alone = LabelledFiles(str(tmp_path / 'train.jsonl'), '{query}', None, None)
    splits = ('training', 'evaluation')
    for message, changes in {
        'a batch of 1 has none: its loss is 0': {'step': StepConfig(1, 16)},
        'same of both: nothing is learnt': {'training': alone},
        'evaluated on pairs of texts': {'evaluation': alone},
        r"called 'validation/recall@1'.*Use one of validation/loss, .*recall_at_1": {
            'checkpoint': CheckpointConfig(best_metric='validation/recall@1')
        },
        "called 'validation/mrr'.*pearson, validation/spearman": {
            'evaluation': LabelledFiles('x', '{query}', '{positive}', '{score}'),
            'checkpoint': CheckpointConfig(best_metric='validation/mrr'),
        },
        "'{other}' reads 'other', which the record does not have.*query, positive": {
            'training': LabelledFiles(str(tmp_path / 'train.jsonl'), '{query}', '{other}', None)
        },
        'an encoder does not do generation': {
            'task': 'generation',
            **{split: LabelledFiles(str(tmp_path / 'train.jsonl'), '{query}', None, '{positive}') for split in splits},
        },
    }.items():
        refused(tmp_path, encoder, message, **changes)
    refused(tmp_path, encoder_decoder, 'an encoder-decoder does not do embedding')
    model = dataclasses.replace(bert(1, vocab=300), num_outputs=3)
    refused(tmp_path, encoder, 'num_outputs = 3, and the task needs 0', model=model)
    with pytest.raises(UserError, match='something else than saying the next token'):
        Generator(decoder_config(num_outputs=2), SamplingConfig(), make_mesh(ONE_DEVICE))
