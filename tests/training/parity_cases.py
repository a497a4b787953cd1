"""Training steps that must give one device's loss and gradients, whatever they combine; see test_parity_matrix.py.

A case is a dict of factors. A covering array of strength n has every combination of the values of any n factors that
the constraints allow.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm.errors import UserError
from llm.models.attention import AttentionConfig
from llm.models.decoder import DecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.layer import LayerConfig
from llm.models.mamba import MambaConfig
from llm.models.mamba2 import Mamba2Config
from llm.models.moe import MoeConfig
from llm.models.normalization import NormConfig
from llm.models.routing import RouterConfig
from llm.parallel.mesh import MeshConfig
from llm.parallel.pipeline.schedules import PipelineConfig
from llm.parallel.sharding import AxisRules
from llm.training.optimizers import OptimizerConfig
from llm.training.schedules import ScheduleConfig
from llm.training.step import StepConfig
from llm.training.trainer import Trainer
from tests.compiling import QUICKLY

AXES = ('data', 'fsdp', 'tensor', 'sequence', 'expert', 'pipeline')
BATCH, LENGTH, DEVICES = 16, 16, 8
Case = dict[str, Any]

FACTORS: dict[str, list[Any]] = {
    **{axis: [1, 2, 4, 8] for axis in AXES},
    'model': ['dense', 'windowed', 'alibi', 'moe', 'mamba', 'hybrid'],
    # Read with pipeline stages, and with rows that devices share; otherwise both are the first value.
    'schedule': ['1f1b', 'gpipe', 'interleaved', 'zero_bubble'],
    'method': ['ring', 'ulysses', 'all_gather'],
    'scan': [True, False],
    # Microbatches: as few as there can be, or twice as many.
    'accumulation': [1, 2],
    'packed': [True, False],
}

ATTENTION = AttentionConfig(num_heads=8, num_kv_heads=8, head_dim=4)
LAYER = LayerConfig(mixer=ATTENTION, feed_forward=FeedForwardConfig(d_ff=32))
WINDOWED = dataclasses.replace(
    LAYER,
    mixer=dataclasses.replace(ATTENTION, window=5, sinks=True, logit_soft_cap=5.0, qk_norm=NormConfig()),
    norm_position='sandwich',
    dropout=0.1,
)
SMALL = DecoderConfig(vocab_size=64, d_model=32, num_layers=1, pattern=(LAYER,), compute_dtype='float64')
MODELS = {
    'dense': SMALL,
    'windowed': dataclasses.replace(
        SMALL, pattern=(LAYER, WINDOWED), tied_embeddings=True, position='learned', max_positions=16, remat='full'
    ),
    'alibi': dataclasses.replace(
        SMALL,
        pattern=(dataclasses.replace(LAYER, parallel=True),),
        position='alibi',
        final_logit_soft_cap=3.0,
        embedding_dropout=0.1,
    ),
    # Attention between layers of both kinds of Mamba, one of them without a feed-forward layer.
    'mamba': dataclasses.replace(
        SMALL,
        pattern=(
            dataclasses.replace(LAYER, mixer=MambaConfig(d_inner=64, dt_rank=2, state_size=4), feed_forward=None),
            LAYER,
            dataclasses.replace(
                LAYER, mixer=Mamba2Config(num_heads=8, head_dim=8, state_size=4, num_groups=2), dropout=0.1
            ),
        ),
    ),
}
# Small rounds of exchange, so that there are several; a first dense layer; a bias that balances; drops.
MOE = MoeConfig(
    num_experts=8,
    experts_per_token=2,
    expert=FeedForwardConfig(d_ff=16),
    shared=FeedForwardConfig(d_ff=16),
    router=RouterConfig(balance_loss=0.1, z_loss=0.01, bias_rate=0.125),
    exchange_share=0.25,
)
DROPPING = dataclasses.replace(
    MOE, dispatch='capacity', capacity_factor=1.0, group_size=8, router=RouterConfig(score='sigmoid', balance_loss=0.1)
)
MODELS['moe'] = dataclasses.replace(
    SMALL,
    pattern=tuple(dataclasses.replace(LAYER, feed_forward=each) for each in (MOE, DROPPING)),
    leading=(LAYER,),
    remat='full',
)
# As Jamba: normalised states, experts behind a recurrence, attention without positions.
_RECURRENT = MambaConfig(d_inner=64, dt_rank=2, state_size=4, state_norm=NormConfig())
MODELS['hybrid'] = dataclasses.replace(
    SMALL,
    position='none',
    pattern=(dataclasses.replace(LAYER, mixer=_RECURRENT, feed_forward=MOE), LAYER),
)
# SGD at rate 1 without clipping: what a parameter changes by is its gradient.
GRADIENT = OptimizerConfig(
    kind='sgd', learning_rate=1.0, momentum=0.0, weight_decay=0.0, clip_norm=None, schedule=ScheduleConfig('constant')
)


WITH_EXPERTS = ('moe', 'hybrid')
# The parts of the hybrid are in the others: the tests run one case of it, tools/parity_matrix.py a covering array.
CHECKED_ALWAYS = tuple(model for model in FACTORS['model'] if model != 'hybrid')


def is_allowed(row: Any) -> bool:
    if math.prod(row[axis] for axis in AXES) != DEVICES:
        return False
    if row['pipeline'] == 1 and row['schedule'] != FACTORS['schedule'][0]:
        return False
    if row['pipeline'] > 1 and not row['scan']:  # a pipeline always loops over its layers
        return False
    if row['expert'] > 1 and row['model'] not in WITH_EXPERTS:  # to the other models it is one more `data`
        return False
    return row['sequence'] > 1 or row['method'] == FACTORS['method'][0]


@functools.cache
def allowed(models: tuple[str, ...] = CHECKED_ALWAYS) -> tuple[Case, ...]:
    """Every case of these models that the constraints allow."""
    meshes = [sizes for sizes in itertools.product(*(FACTORS[axis] for axis in AXES)) if math.prod(sizes) == DEVICES]
    options = list(itertools.product(*(values for factor, values in FACTORS.items() if factor not in AXES)))
    rows = (dict(zip(FACTORS, mesh + values, strict=True)) for mesh in meshes for values in options)
    return tuple(row for row in rows if row['model'] in models and is_allowed(row))


def cost(case: Case) -> float:
    """About how many processor seconds a case takes, most of them the compiler's."""
    by_model = {'dense': 2, 'alibi': 3, 'windowed': 5, 'moe': 8, 'mamba': 9, 'hybrid': 12}
    by_schedule = {'gpipe': 1.6, '1f1b': 1.6, 'interleaved': 2.5, 'zero_bubble': 2.0}
    loop = by_schedule[case['schedule']] if case['pipeline'] > 1 else 1 if case['scan'] else 1.5
    return by_model[case['model']] * loop * (1.3 if case['sequence'] > 1 else 1)


def covering(case: Case, strength: int) -> list[Any]:
    """What a case has: values of so many factors."""
    return [tuple((factor, case[factor]) for factor in group) for group in itertools.combinations(FACTORS, strength)]


def cases(strength: int, models: tuple[str, ...] = CHECKED_ALWAYS) -> list[Case]:
    """A covering array of these models, by greedy set cover over all cases that are allowed.

    The library covertable, which sees of a constraint only whether it holds, made 494 of the factors for which this
    made 57.
    """
    rows = allowed(models)
    covers = [frozenset(covering(row, strength)) for row in rows]
    open_, chosen = set().union(*covers), []
    while open_:
        best = max(range(len(rows)), key=lambda i: len(covers[i] & open_))
        chosen.append(rows[best])
        open_ -= covers[best]
    return chosen


@functools.cache
def cheap_cases() -> tuple[Case, ...]:
    """A covering array of strength 2 of the models that are checked always, for the tests: 85 cases.

    Takes cases that have much that few have, and cost little: a sixth less than those of `cases`.
    """
    rows = allowed()
    numbers: dict[Any, int] = {}
    found = [[numbers.setdefault(each, len(numbers)) for each in covering(row, 2)] for row in rows]
    covers = np.zeros((len(rows), len(numbers)), np.float32)
    np.put_along_axis(covers, np.array(found), 1, axis=1)
    weights, divisors = 1 / covers.sum(axis=0), np.sqrt([cost(row) for row in rows])
    chosen = []
    while weights.any():
        best = int(np.argmax(covers @ weights / divisors))
        chosen.append(best)
        weights[covers[best] > 0] = 0
    return tuple(rows[i] for i in chosen)


def hybrid_case(**sizes: int) -> Case:
    """Packed rows of the hybrid on a mesh with axes of these sizes."""
    plain = {factor: values[0] for factor, values in FACTORS.items()}
    return plain | {'model': 'hybrid', **sizes}


def name(case: Case) -> str:
    """Of a test."""
    axes = '.'.join(f'{axis}{case[axis]}' for axis in AXES if case[axis] > 1)
    parts = [axes, case['model'], f'{microbatches(case)} microbatches', 'packed' if case['packed'] else 'whole']
    parts += [case['schedule']] * (case['pipeline'] > 1) + [case['method']] * (case['sequence'] > 1)
    return ', '.join(parts + ['unrolled'] * (not case['scan']))


def microbatches(case: Case) -> int:
    """Of the step."""
    return int(case['pipeline'] * case['accumulation'])


def batch(packed: bool) -> dict[str, np.ndarray]:
    """Random tokens, [B, S]; rows differ in their number of real tokens."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 64, size=(BATCH, LENGTH + 1)).astype(np.int32)
    weights = np.ones((BATCH, LENGTH), np.float32)
    weights[1, 9:] = weights[5, :] = 0
    segments = np.ones((BATCH, LENGTH), np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1))
    if packed:
        for row in range(BATCH):
            cut = 3 + row % 8
            segments[row, cut:] = 2
            positions[row, cut:] -= cut
            weights[row, cut - 1] = 0
    arrays = {'inputs': tokens[:, :-1], 'targets': tokens[:, 1:], 'loss_weights': weights}
    return arrays | {'segment_ids': segments, 'positions': positions}


def _model(model: str, repeats: int, scan: bool) -> DecoderConfig:
    config = MODELS[model]
    layers = repeats * len(config.pattern) + len(config.leading)
    return dataclasses.replace(config, num_layers=layers, scan_layers=scan)


def _run(trainer: Trainer, initial: Any, packings: tuple[bool, ...]) -> tuple[list[tuple[float, Any]], str]:
    """([(loss, gradients) of rows packed like this], HLO text) of a step."""
    compiled: Any = None
    found = []
    with jax.enable_x64():
        for packed in packings:
            state = jax.device_put(initial, trainer.state_shardings)
            rows = jax.device_put(batch(packed), trainer.batch_sharding)
            compiled = compiled or trainer.train_step.lower(state, rows).compile(QUICKLY)
            state, metrics = compiled(state, rows)
            pairs = initial['parameters'], jax.device_get(state['parameters'])
            gradients = jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), *pairs)
            found.append((float(metrics['loss']), gradients))
    return found, compiled.as_text()


@functools.cache
def _one_device_trainer(model: str, repeats: int, count: int) -> Trainer:
    with jax.enable_x64():
        return Trainer(
            _model(model, repeats, True),
            GRADIENT,
            StepConfig(BATCH, LENGTH, count, z_loss=1e-3),
            total_steps=10,
            mesh=MeshConfig(data=1),
            devices=jax.devices()[:1],
        )


@functools.cache
def _initial_state(model: str, repeats: int) -> Any:
    """In float64, whatever the mesh."""
    with jax.enable_x64():
        fresh = jax.jit(_one_device_trainer(model, repeats, 1)._fresh_state, static_argnums=0)(0)
        return jax.device_get(jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, fresh))


@functools.cache
def _one_device(model: str, repeats: int, count: int) -> list[tuple[float, Any]]:
    """(loss, gradients) of whole rows and of packed ones, which are one program."""
    trainer = _one_device_trainer(model, repeats, count)
    return _run(trainer, _initial_state(model, repeats), (False, True))[0]


def one_device(model: str, repeats: int, count: int, packed: bool) -> tuple[float, Any]:
    """(loss, gradients) of one device; with `count` microbatches where dropout, which they decide, is there."""
    config = MODELS[model]
    drops = config.embedding_dropout > 0 or any(layer.dropout > 0 for layer in config.pattern)
    return _one_device(model, repeats, count if drops else 1)[packed]


# What the program must have for an axis to have done anything; XLA:CPU writes a reduce-scatter as an all-reduce.
COLLECTIVES = {
    'data': ('all-reduce',),
    'fsdp': ('all-gather', 'all-reduce'),
    'tensor': ('all-reduce', 'all-gather'),
    'expert': ('all-reduce',),
    'pipeline': ('collective-permute',),
}
METHODS = {'ring': ('collective-permute', 'all-to-all'), 'ulysses': ('all-to-all',), 'all_gather': ('all-gather',)}


def errors(case: Case) -> list[str]:
    """What is wrong with a case; a case that is refused raises UserError."""
    chunks = 2 if case['schedule'] == 'interleaved' else 1
    repeats = max(2, case['pipeline'] * chunks)
    count = microbatches(case)
    with jax.enable_x64():
        trainer = Trainer(
            _model(case['model'], repeats, case['scan']),
            GRADIENT,
            StepConfig(BATCH, LENGTH, count, z_loss=1e-3),
            total_steps=10,
            mesh=MeshConfig(**{axis: case[axis] for axis in AXES}),
            rules=AxisRules(sequence_method=case['method']),
            devices=jax.devices()[:DEVICES],
            pipeline=PipelineConfig(case['schedule'], chunks),
        )
    loss, gradients = one_device(case['model'], repeats, count, case['packed'])
    initial = _initial_state(case['model'], repeats)
    [(parallel_loss, parallel_gradients)], program = _run(trainer, initial, (case['packed'],))
    found = []
    if not abs(parallel_loss - loss) <= 1e-7 * abs(loss):  # the metric is stored in fp32
        found.append(f'loss {parallel_loss} and not {loss}')
    for path, expected in jax.tree_util.tree_leaves_with_path(gradients):
        actual = functools.reduce(lambda tree, key: tree[key.key], path, parallel_gradients)
        worst = np.abs(actual - expected).max() / np.abs(expected).max()
        if not worst <= 1e-9:
            found.append(f'gradient of {jax.tree_util.keystr(path)} off by {worst:.1e} of its largest value')
    wanted = {collective for axis in AXES if case[axis] > 1 for collective in COLLECTIVES.get(axis, ())}
    missing = [each for each in sorted(wanted) if f'{each}(' not in program and f'{each}-start(' not in program]
    found += [f'no {collective} in the program' for collective in missing]
    if case['expert'] > 1 and case['model'] in WITH_EXPERTS and ' all-to-all' not in program:
        found.append('no all-to-all in the program')
    if case['sequence'] > 1 and not any(f' {collective}' in program for collective in METHODS[case['method']]):
        found.append(f'none of {METHODS[case["method"]]} in the program')
    return found


def verdict(case: Case) -> tuple[str, list[str]]:
    """('equal' | 'refused' | 'differs', why)."""
    try:
        found = errors(case)
    except UserError as error:
        return 'refused', [str(error)]
    return ('differs', found) if found else ('equal', [])
