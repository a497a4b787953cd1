"""The training loop: steps, metrics, evaluation, samples, checkpoints, and stopping in an orderly way."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from llm.errors import UserError
from llm.training.checkpoints import Checkpointer
from llm.training.early_stopping import Patience
from llm.training.metrics import MetricsWriter
from llm.training.multi_token import depth_metrics
from llm.training.progress import Progress
from llm.training.routing import routing_metrics
from llm.training.sentence_pairs import pair_metrics
from llm.training.step import Batch, State
from llm.training.stopping import stop_requests
from llm.training.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long to train and what to do on the way. Intervals are in steps; 0 means only at the end.

    Attributes:
        total_steps: the run ends after this many updates.
        log_every: metrics of every such step are written.
        evaluate_every, sample_every: how often every evaluation set is scored, and samples are drawn.
        patience: stop early once so many evaluations in a row were no better than the best before (see
            CheckpointConfig.best_metric); 0 never does.
        profile_first_step, profile_steps: write a profiler trace of so many steps to <run>/profile; 0 steps: none.
        evaluate_first: whether evaluation sets are scored before the first step, too.
    """

    total_steps: int
    log_every: int = 1
    evaluate_every: int = 0
    sample_every: int = 0
    patience: int = 0
    profile_first_step: int = 10
    profile_steps: int = 0
    evaluate_first: bool = False

    def __post_init__(self) -> None:
        if self.total_steps < 1 or self.log_every < 1 or min(self.evaluate_every, self.sample_every, self.patience) < 0:
            raise UserError(
                f'{self} is out of range',
                where='LoopConfig',
                fix='Use total_steps and log_every of at least 1, and other intervals of at least 0.',
            )


class Batches(Protocol):
    """Global batches by position: `batch(i)` is the same whatever was read before."""

    def batch(self, step: int) -> Batch: ...


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A named evaluation set.

    Attributes:
        batches, num_batches: its batches, and how many there are.
        num_bytes: the raw bytes that they encode; 0 if not known.
        step: compiled (parameters, batch) -> {'nll', 'tokens', and more}; None for the trainer's evaluation_step.
        score: more figures by name, given the parameters, and of each batch what `step` gave beside the sums.
    """

    batches: Batches
    num_batches: int
    num_bytes: int = 0
    step: Callable[..., dict[str, Any]] | None = None
    score: Callable[[Any, list[dict[str, np.ndarray]]], dict[str, float]] | None = None


# What an evaluation step gives that adds up over batches.
_SUMS = ('nll', 'tokens', 'routing', 'pairs', 'ahead')


def evaluate(trainer: Trainer, parameters: Any, evaluation: Evaluation) -> dict[str, float]:
    """Loss (nats per token), perplexity and, where the bytes are known, bits per byte over the whole set.

    Sums are taken in float64 on the host, batch by batch in order.
    """
    sums: dict[str, Any] = {}
    more: list[dict[str, np.ndarray]] = []
    step, memory = evaluation.step or trainer.evaluation_step, trainer.fresh_memory()
    for index in range(evaluation.num_batches):
        batch = evaluation.batches.batch(index)
        found = dict(step(parameters, batch) if memory is None else step(parameters, batch, memory))
        memory = found.pop('memory', None)
        part = {name: found.pop(name) for name in _SUMS if name in found}
        part = jax.tree.map(lambda x: np.asarray(x, np.float64), part)
        sums = jax.tree.map(np.add, sums, part) if sums else part
        more.append({name: np.asarray(value) for name, value in found.items()})
    nll, tokens = float(sums['nll']), float(sums['tokens'])
    loss = nll / tokens
    values = {'loss': loss, 'perplexity': math.exp(min(loss, 700.0)), 'tokens': tokens}
    further = routing_metrics(sums.get('routing', {}), tokens)
    if 'pairs' in sums and sums['pairs']['pairs']:
        further |= pair_metrics(sums)
    if 'ahead' in sums:
        depths = zip(depth_metrics(sums).items(), sums['ahead']['tokens'], strict=True)
        further |= dict(figure for figure, targets in depths if targets)
    values |= {name: float(value) for name, value in further.items()}
    if evaluation.num_bytes:
        values['bits_per_byte'] = nll / math.log(2) / evaluation.num_bytes
    return values if evaluation.score is None else values | evaluation.score(parameters, more)


@dataclasses.dataclass
class TrainingLoop:
    """One run from its current state to its last step.

    Attributes:
        sample: given (parameters, step), draws samples and stores them; passed in by the job.
        flops_per_token, causal_flops_per_token: of forward and backward in both conventions for causal attention, and
            peak_flops: of all devices together, for MFU. tokens_per_step: how many tokens of a step these FLOPs are of;
            None for those with a loss.
        metadata: JSON stored with every checkpoint.
        last_step: after which the run ended, once it has: the last of all, or that at which patience did.
    """

    trainer: Trainer
    config: LoopConfig
    batches: Batches
    evaluations: Mapping[str, Evaluation]
    checkpointer: Checkpointer
    writer: MetricsWriter
    run_directory: Path
    metadata: dict[str, Any]
    sample: Callable[[Any, int], object] | None = None
    flops_per_token: float = 0.0
    causal_flops_per_token: float = 0.0
    peak_flops: float = 0.0
    tokens_per_step: int | None = None
    last_step: int | None = dataclasses.field(default=None, init=False)
    _tracing: bool = dataclasses.field(default=False, init=False)

    def run(self, state: State) -> bool:
        """Train `state` (donated) until the end; False if a signal stopped it before.

        The end is after `total_steps`, or when patience does.

        Raises:
            UserError: the loss is not finite. The last checkpoint is from before it.
        """
        total = self.config.total_steps
        step = int(state['step'])
        self._patience = Patience.of_run(self.checkpointer.config, self.config.patience, self.run_directory)
        with stop_requests() as stop, Progress(total, step, enabled=jax.process_index() == 0) as progress:
            self._progress = progress
            if step == 0 and self.config.evaluate_first:
                self._evaluate(step, state)
            clock = time.perf_counter()
            pending: tuple[int, Any] | None = None
            while step < total and not self._patience.exhausted and not stop.due(step):
                self._profile(step, state)
                batch = self.batches.batch(step)
                state, metrics = self.trainer.train_step(state, batch)
                step += 1
                # The previous step's metrics are read while this one runs, so the device never waits for the host.
                if pending:
                    clock = self._record(*pending, clock)
                pending = (step, metrics)
                if self._due(step):
                    clock = self._record(*pending, clock)
                    pending = None
                    self._visit(step, state)
                    clock = time.perf_counter()
            if pending:
                self._record(*pending, clock)
            self._profile(math.inf, state)
            early = self._patience.exhausted
            if step < total:
                self._save(step, state)  # nothing, if this step is saved already
                why = f'{self.config.patience} evaluations without a better one' if early else stop.reason
                progress.say(f'stopped by {why} after step {step}, which is saved')
            self.checkpointer.wait()
        self.last_step = step if early or step >= total else None
        return self.last_step is not None

    def _due(self, step: int) -> bool:
        intervals = (self.config.evaluate_every, self.config.sample_every, self.checkpointer.config.save_every)
        return step == self.config.total_steps or any(every and step % every == 0 for every in intervals)

    def _visit(self, step: int, state: State) -> None:
        """Evaluation, samples and checkpoint after a step at which any of them is due, in this order."""

        def due(every: int) -> bool:
            return step == self.config.total_steps or bool(every and step % every == 0)

        scores = self._evaluate(step, state) if due(self.config.evaluate_every) else {}
        if self.sample and due(self.config.sample_every):
            self.sample(state['parameters'], step)
        if due(self.checkpointer.config.save_every):
            self._save(step, state, scores)

    def _evaluate(self, step: int, state: State) -> dict[str, float]:
        """Score every evaluation set; the figures by set and name."""
        scores: dict[str, float] = {}
        for name, evaluation in self.evaluations.items():
            start = time.perf_counter()
            values = evaluate(self.trainer, state['parameters'], evaluation)
            timing = {'seconds': time.perf_counter() - start}
            if not math.isfinite(values['loss']):  # the update was bad: its checkpoint must not push out good ones
                raise self._not_finite(f'the loss on {name} is {values["loss"]}', step)
            self.writer.write(step, 'evaluation', {'set': name, **values}, timing=timing)
            scores |= {f'{name}/{key}': value for key, value in values.items()}
        self._progress.update(step, scores)
        self._patience.add(scores)
        return scores

    def _save(self, step: int, state: State, scores: dict[str, float] | None = None) -> None:
        self.writer.sync()  # a checkpoint vouches for the metrics before it
        self.checkpointer.save(step, self.trainer.state_dict(state), self.metadata, scores or None)

    def _record(self, step: int, metrics: Any, since: float) -> float:
        """Write one step's metrics and check them; returns the time at which they were there."""
        values = {name: float(np.asarray(value)) for name, value in metrics.items()}
        now = time.perf_counter()
        if not (math.isfinite(values['loss']) and math.isfinite(values['gradient_norm'])):
            raise self._not_finite(
                f'the loss is {values["loss"]} and the gradient norm {values["gradient_norm"]}', step
            )
        seconds = max(now - since, 1e-9)
        rate = values['tokens'] / seconds
        timing = {'seconds': seconds, 'tokens_per_second': rate}
        if self.peak_flops:
            share = (self.tokens_per_step or values['tokens']) / seconds / self.peak_flops
            timing |= {'mfu': share * self.flops_per_token, 'mfu_causal': share * self.causal_flops_per_token}
        if step % self.config.log_every == 0 or step == self.config.total_steps:
            self.writer.write(step, 'train', values, timing=timing)
        self._progress.update(step, values | timing)
        return now

    def _not_finite(self, what: str, step: int) -> UserError:
        with contextlib.suppress(UserError):
            self.checkpointer.wait()
        kept = self.checkpointer.latest_step()
        rows = self.trainer.step_config.batch_size
        return UserError(
            f'{what} at step {step} (batch {step - 1}: examples {(step - 1) * rows} to {step * rows - 1} of the data '
            f'order); {"there is no checkpoint yet" if kept is None else f"the checkpoint of step {kept} is kept"}',
            where=str(self.run_directory),
            fix='Look at those examples, or lower the learning rate or clip_norm and start another run directory; '
            'Pretrain.initial_parameters can be this one.',
        )

    def _profile(self, step: float, state: State) -> None:
        """Start or stop the profiler's trace before `step`; infinity is after the last."""
        first, steps = self.config.profile_first_step, self.config.profile_steps
        if jax.process_index() > 0:  # the others do the same
            return
        if not self._tracing and first <= step < first + steps:
            jax.profiler.start_trace(str(self.run_directory / 'profile'))
            self._tracing = True
        elif self._tracing and step >= first + steps:
            jax.block_until_ready(state)  # steps are still running when the loop is past them
            jax.profiler.stop_trace()
            self._tracing = False
