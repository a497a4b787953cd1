"""The finetune job: it learns, stops early, resumes exactly, and leaves runs that other jobs read."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from llm.configuration import Invocation
from llm.data.labelled import LabelledFiles
from llm.errors import UserError
from llm.jobs.finetune import Finetune
from llm.jobs.scoring_labels import AnswersConfig
from llm.jobs.trained_model import open_trained_model
from llm.models.low_rank import LowRankConfig
from llm.models.parameters import named_specs
from llm.parallel.mesh import make_mesh
from llm.parallel.sharding import AxisRules
from llm.training.checkpoints import CheckpointConfig
from llm.training.loop import LoopConfig
from llm.training.metrics import read_metrics
from llm.training.optimizers import OptimizerConfig
from llm.training.schedules import ScheduleConfig
from llm.training.step import StepConfig
from tests.jobs.test_generate import ONE_DEVICE, write_run

RUN = Invocation(dry_run=False, operative_config='', command=(), config_files=())


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp('runs') / 'base')


@pytest.fixture(autouse=True)
def _no_compilation_cache(monkeypatch, tmp_path):
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'compiled'))


def _records(path, task, count, seed):
    """Texts that are good or bad by one word, and numbers, tags and answers that follow from it."""
    generator = np.random.default_rng(seed)
    if task == 'tagging':
        words = [['ant', 'bee'][i] for i in generator.integers(0, 2, count * 3)]
        lines = [f'{word} {"B-A" if word == "ant" else "O"}' for word in words]
        sentences = ['\n'.join(lines[i : i + 3]) for i in range(0, len(lines), 3)]
        path = path.with_suffix('.conll')
        path.write_text('\n\n'.join(sentences) + '\n')
        return path
    labels = {'classification': ('bad', 'good'), 'regression': (-1.5, 0.5), 'generation': ('no', 'yes')}[task]
    rows = [
        {'text': f'{"xyz"[generator.integers(3)]} {["ugh", "wow"][kind]} ', 'label': labels[kind]}
        for kind in generator.integers(0, 2, count).tolist()
    ]
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


def _job(tmp_path, base, task='classification', steps=60, name='run', **more):
    files = [
        LabelledFiles(str(_records(tmp_path / f'{split}.jsonl', task, count, seed)))
        for seed, (split, count) in enumerate((('train', 64), ('validation', 20)))
    ]
    metric = {'classification': 'accuracy', 'regression': 'pearson', 'tagging': 'span_f1'}.get(task, 'exact_match')
    settings = {
        'checkpoint': CheckpointConfig(save_every=steps, best_metric=f'validation/{metric}', best_mode='max'),
        'loop': LoopConfig(steps, evaluate_every=steps // 2),
        'answers': AnswersConfig(examples=20, max_new_tokens=8, pattern='(yes|no)'),
        **more,
    }
    return Finetune(
        str(tmp_path / name),
        str(base),
        task,
        *files,
        OptimizerConfig(learning_rate=3e-3, schedule=ScheduleConfig('constant'), weight_decay=0.0),
        StepConfig(batch_size=16, sequence_length=24),
        mesh=ONE_DEVICE,
        **settings,
    )


def _last_scores(directory):
    return [line for line in read_metrics(directory) if line['kind'] == 'evaluation'][-1]


@pytest.mark.parametrize(
    ('task', 'figure'),
    [
        ('classification', 'accuracy'),
        ('regression', 'pearson'),
        ('tagging', 'span_f1'),
        ('generation', 'answer_accuracy'),
    ],
)
def test_it_learns_what_follows_from_a_word(tmp_path, base, task, figure, capsys):
    assert _job(tmp_path, base, task)(RUN) == 0
    assert _last_scores(tmp_path / 'run')[figure] > 0.95
    predictions = [json.loads(line) for line in (tmp_path / 'run' / 'predictions.jsonl').read_text().splitlines()]
    assert len(predictions) == 20
    assert predictions[0].keys() == {'where', 'label', 'predicted'}
    assert figure in capsys.readouterr().out


def test_adapters_leave_the_base_as_it_is(tmp_path, base):
    job = _job(tmp_path, base, 'generation', steps=4, low_rank=LowRankConfig(rank=2, targets=('query', 'value')))
    assert job(RUN) == 0
    mesh = make_mesh(ONE_DEVICE)
    before = dict(named_specs(open_trained_model(base).restore(mesh, AxisRules()).state))
    model = open_trained_model(tmp_path / 'run')
    assert model.config.low_rank == job.low_rank
    after = dict(named_specs(model.restore(mesh, AxisRules()).state))
    assert any(name.endswith('query/up') and np.any(value) for name, value in after.items())
    kept = {name.removesuffix('/base'): value for name, value in after.items() if name.removesuffix('/base') in before}
    assert kept.keys() == before.keys()
    for name, value in kept.items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path, base):
    def lines(name):
        return [{k: v for k, v in line.items() if k != 'timing'} for line in read_metrics(tmp_path / name)]

    checkpoint = CheckpointConfig(save_every=10)
    job = _job(tmp_path, base, steps=20, checkpoint=checkpoint)
    job(RUN)
    whole = lines('run')
    shutil.rmtree(next((tmp_path / 'run' / 'checkpoints').glob('*20*')))
    (tmp_path / 'run' / 'complete').unlink()
    assert job(RUN) == 0
    assert lines('run') == whole


def test_it_stops_when_nothing_becomes_better(tmp_path, base):
    # At a rate of 1e-12 the figure stays what it is.
    still = OptimizerConfig(learning_rate=1e-12, schedule=ScheduleConfig('constant'))
    job = dataclasses.replace(
        _job(tmp_path, base, steps=40), optimizer=still, loop=LoopConfig(40, evaluate_every=5, patience=2)
    )
    assert job(RUN) == 0
    assert _last_scores(tmp_path / 'run')['step'] == 15
    assert (tmp_path / 'run' / 'complete').read_text() == '15\n'


def test_mistakes_are_named(tmp_path, base):
    job = _job(tmp_path, base)
    with pytest.raises(UserError, match='has no config.gin'):
        dataclasses.replace(job, base=str(tmp_path))(RUN)
    with pytest.raises(UserError, match='does not hold examples for tagging'):
        dataclasses.replace(job, task='tagging')(RUN)
    with pytest.raises(UserError, match='nothing says which figure'):
        dataclasses.replace(job, loop=LoopConfig(4, patience=1), checkpoint=CheckpointConfig())(RUN)
