"""The loop on batches in memory: what it writes and when, how it stops, and that stopping changes nothing."""

import dataclasses
import itertools
import json
import math
import signal
import threading

import jax
import numpy as np
import pytest

from llm.errors import UserError
from llm.training.checkpoints import CheckpointConfig, Checkpointer, committed_steps
from llm.training.loop import Evaluation, LoopConfig, TrainingLoop, evaluate
from llm.training.metrics import METRICS_FILE, MetricsWriter
from llm.training.optimizers import OptimizerConfig
from llm.training.schedules import ScheduleConfig
from llm.training.step import StepConfig
from llm.training.trainer import Trainer
from tests.models.small_decoders import decoder_config, layer, run
from tests.training.random_batches import LENGTH, ROWS, VOCABULARY, RandomBatches

MODEL = decoder_config(layer(dropout=0.1), vocab_size=VOCABULARY, num_layers=1)
OPTIMIZER = OptimizerConfig(learning_rate=0.03, schedule=ScheduleConfig('constant'))


@pytest.fixture(scope='module')
def trainer():
    return Trainer(MODEL, OPTIMIZER, StepConfig(ROWS, LENGTH), 1, devices=jax.devices()[:1])


@pytest.fixture(scope='module')
def initial(trainer):
    """The state before step 0, on the host."""
    return jax.device_get(trainer.fresh_state())


@dataclasses.dataclass
class Ran:
    """What came of a loop: whether it reached its end, the lines it wrote, and what it called, in order."""

    complete: bool
    lines: list
    events: list


class Recorded(Checkpointer):
    """A checkpointer that notes when it is asked to save."""

    def save(self, step, *arguments):
        self.events.append(('save', step))
        return super().save(step, *arguments)


@pytest.fixture
def loop(trainer, initial, tmp_path):
    """Runs a loop in a directory, from its newest checkpoint if it has one."""

    def loop(config, name='run', sample=None, **checkpoint):
        directory = tmp_path / name
        events = []
        with Recorded(directory / 'checkpoints', CheckpointConfig(**checkpoint)) as checkpointer:
            checkpointer.events = events
            if checkpointer.latest_step() is None:
                state = jax.device_put(initial, trainer.state_shardings)
            else:
                state = trainer.from_state_dict(checkpointer.restore(trainer.state_dict(trainer.abstract_state)).state)

            def draw(parameters, step):
                events.append(('sample', step))
                if sample:
                    sample(step)

            with MetricsWriter(directory, int(state['step'])) as writer:
                complete = TrainingLoop(
                    trainer=trainer,
                    config=config,
                    batches=RandomBatches(),
                    evaluations={
                        'seen': Evaluation(RandomBatches(), 2, 1000),
                        'other': Evaluation(RandomBatches(seed=1), 1, 0),
                    },
                    checkpointer=checkpointer,
                    writer=writer,
                    run_directory=directory,
                    metadata={'data': 'random'},
                    sample=draw,
                ).run(state)
        text = (directory / METRICS_FILE).read_text()
        return Ran(complete, [json.loads(line) for line in text.splitlines()], events)

    return loop


def results(lines):
    """Metric lines without timings."""
    return [{name: value for name, value in line.items() if name != 'timing'} for line in lines]


def arrays(tmp_path, trainer, name, step):
    with Checkpointer(tmp_path / name / 'checkpoints', CheckpointConfig()) as checkpointer:
        state = checkpointer.restore(trainer.state_dict(trainer.abstract_state), step).state
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


def test_what_is_written_and_when(loop, tmp_path):
    ran = loop(LoopConfig(7, log_every=3, evaluate_every=4, sample_every=2), save_every=6)
    assert ran.complete
    order = [(line['kind'], line['step'], line.get('set')) for line in ran.lines]
    evaluation = [[('evaluation', step, 'seen'), ('evaluation', step, 'other')] for step in (4, 7)]
    train = [('train', step, None) for step in (3, 6, 7)]
    assert order == [train[0], *evaluation[0], train[1], train[2], *evaluation[1]]
    # Samples come before the checkpoint of the same step, which vouches for them.
    assert ran.events == [*(('sample', step) for step in (2, 4, 6)), ('save', 6), ('sample', 7), ('save', 7)]
    assert committed_steps(tmp_path / 'run' / 'checkpoints') == [6, 7]
    assert set(ran.lines[0]) == {
        *('kind', 'step', 'timing'),
        *('loss', 'z_loss', 'gradient_norm', 'learning_rate', 'tokens'),
    }
    assert {'seconds', 'tokens_per_second'} <= set(ran.lines[0]['timing'])
    assert 'bits_per_byte' in ran.lines[1] and 'bits_per_byte' not in ran.lines[2]


def test_the_loss_falls_on_what_is_learnt_and_the_best_checkpoint_is_kept(loop, trainer, tmp_path):
    config = LoopConfig(40, evaluate_every=10)
    ran = loop(config, save_every=10, keep_last=1, keep_best=1, best_metric='other/loss')
    losses = [line['loss'] for line in ran.lines if line['kind'] == 'train']
    assert losses[0] == pytest.approx(math.log(VOCABULARY), rel=0.02)
    assert losses[-1] < 0.5 * losses[0]
    # Learnt by heart: other random tokens become ever less likely, so that the first checkpoint stays the best.
    other = [line['loss'] for line in ran.lines if line.get('set') == 'other']
    assert other == sorted(other) and len(other) == 4
    assert committed_steps(tmp_path / 'run' / 'checkpoints') == [10, 40]


def test_evaluation_is_the_mean_over_all_tokens(trainer, initial):
    parameters = initial['parameters']
    batches = RandomBatches(period=3)
    found = evaluate(trainer, parameters, Evaluation(batches, 3, 777))
    total = weight = 0.0
    for step in range(3):
        batch = batches.batch(step)
        logits = run(MODEL, parameters, batch['inputs'], positions=batch['positions'], segment_ids=batch['segment_ids'])
        logits = np.asarray(logits, np.float64)
        chosen = np.take_along_axis(logits, batch['targets'][..., None], -1)[..., 0]
        total += ((np.log(np.exp(logits).sum(-1)) - chosen) * batch['loss_weights']).sum()
        weight += batch['loss_weights'].sum()
    assert found['tokens'] == weight
    assert found['loss'] == pytest.approx(total / weight, rel=1e-6)
    assert found['perplexity'] == pytest.approx(math.exp(total / weight), rel=1e-5)
    assert found['bits_per_byte'] == pytest.approx(total / math.log(2) / 777, rel=1e-6)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize('step', [3, 5])
def test_a_signal_saves_and_nothing_changes_by_it(loop, trainer, tmp_path, number, step, capsys):
    config = LoopConfig(8, evaluate_every=4, sample_every=1)
    whole = loop(config, 'whole', save_every=5)
    before = signal.getsignal(number)
    stopped = loop(config, 'stopped', lambda now: signal.raise_signal(number) if now == step else None, save_every=5)
    assert signal.getsignal(number) is before
    assert not stopped.complete
    assert f'stopped by {number.name} after step {step}, which is saved' in capsys.readouterr().err
    assert committed_steps(tmp_path / 'stopped' / 'checkpoints') == [step]
    assert max(line['step'] for line in stopped.lines) == step
    resumed = loop(config, 'stopped', save_every=5)
    assert resumed.complete
    assert results(resumed.lines) == results(whole.lines)
    assert arrays(tmp_path, trainer, 'stopped', 8) == arrays(tmp_path, trainer, 'whole', 8)


def test_a_signal_in_the_last_step_is_too_late_to_stop_anything(loop):
    assert loop(LoopConfig(2), sample=lambda step: signal.raise_signal(signal.SIGTERM)).complete


def test_a_second_interrupt_does_not_wait(loop):
    def twice(step):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        loop(LoopConfig(3, sample_every=1), sample=twice)


def test_a_loop_outside_the_main_thread_leaves_signals_alone(loop):
    results = []
    thread = threading.Thread(target=lambda: results.append(loop(LoopConfig(2)).complete))
    thread.start()
    thread.join()
    assert results == [True]


def test_stopped_after_every_step_nothing_changes(loop, trainer, tmp_path):
    config = LoopConfig(6, evaluate_every=3, sample_every=1)
    whole = loop(config, 'whole', save_every=6)
    for step in itertools.count(1):
        part = loop(config, 'parts', lambda now: signal.raise_signal(signal.SIGTERM), save_every=6)
        if part.complete:
            break
        assert part.events == [('sample', step), ('save', step)]
    assert step == 6
    assert results(part.lines) == results(whole.lines)
    assert arrays(tmp_path, trainer, 'parts', 6) == arrays(tmp_path, trainer, 'whole', 6)


def test_a_profile_is_written_when_asked_for_and_changes_nothing(loop, tmp_path):
    plain = loop(LoopConfig(5), 'plain')
    assert not (tmp_path / 'plain' / 'profile').exists()
    profiled = loop(LoopConfig(5, profile_first_step=2, profile_steps=2), 'profiled')
    (trace,) = (tmp_path / 'profiled' / 'profile').rglob('*.xplane.pb')
    assert b'train_step' in trace.read_bytes()
    assert results(profiled.lines) == results(plain.lines)
    # To the end, where fewer steps are left than asked for.
    loop(LoopConfig(3, profile_first_step=2, profile_steps=9), 'end')
    assert list((tmp_path / 'end' / 'profile').rglob('*.xplane.pb'))


@pytest.mark.parametrize(
    'changes', [{'total_steps': 0}, {'log_every': 0}, {'evaluate_every': -1}, {'sample_every': -1}]
)
def test_intervals_out_of_range(changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        LoopConfig(**{'total_steps': 1, **changes})
