"""Pretraining what is no plain decoder from the run files: the loss falls, and a resumed run is the same."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest

from llm.main import main
from llm.training.checkpoints.directory import step_path
from llm.training.checkpoints.restoring import restore_newest
from llm.training.metrics import read_json_lines
from tests.jobs.tiny_run import TinyRun, compiled, tiny_run  # noqa: F401

STEPS, SAVED = 40, 20
BINDINGS = {
    'VOCAB_SIZE': '420',
    'D_MODEL': '32',
    'NUM_LAYERS': '1',
    'NUM_HEADS': '2',
    'HEAD_DIM': '16',
    'D_FF': '64',
    'DROPOUT': '0.1',
    'VALIDATION_FRACTION': '0.2',
    'TOTAL_STEPS': str(STEPS),
    'WARMUP_STEPS': '4',
    'LEARNING_RATE': '5e-3',
    'BATCH_SIZE': '8',
    'SEQUENCE_LENGTH': '48',
    'EVALUATE_EVERY': str(SAVED),
    'SAVE_EVERY': str(SAVED),
    'VOCABULARY': '@training.VocabularyConfig()',
    'training.VocabularyConfig.kind': "'bytes'",
    'datasets.DataConfig.workers': '1',
    'mesh.MeshConfig.data': '1',
}


def start(run: TinyRun, name: str, *more: str) -> int:
    """The run file of this name, made tiny, on the corpus of `run`."""
    settings = BINDINGS | {'FILES': repr(str(run.corpus)), 'RUN_DIRECTORY': repr(str(run.directory))}
    imports = run.folder / 'imports.gin'
    imports.write_text(
        'from __gin__ import dynamic_registration\nfrom llm.data import datasets\n'
        'from llm.data.objectives import denoising\nfrom llm.data.vocabularies import training\n'
        'from llm.jobs import pretrain\nfrom llm.jobs import sampling\n'
        'from llm.parallel import mesh\n'
    )
    bindings = [f'{key} = {value}' for key, value in settings.items()] + list(more)
    gin = [f'gin_configs/runs/{name}.gin', str(imports)]
    return main([*(f'--gin_file={file}' for file in gin), *(f'--gin_bindings={binding}' for binding in bindings)])


def recorded(run: TinyRun) -> list[dict]:
    """All metrics but timings."""
    lines = read_json_lines(run.directory / 'metrics.jsonl')
    return [{key: value for key, value in line.items() if key != 'timing'} for line in lines]


def arrays(run: TinyRun) -> list[np.ndarray]:
    """Everything that the last checkpoint holds."""
    last = step_path(run.checkpoints, STEPS)
    described = json.loads((last / 'metadata.json').read_text())['arrays']
    tree: dict = {}
    for name, (dtype, shape) in described.items():
        *parents, leaf = name.split('/')
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[leaf] = jax.ShapeDtypeStruct(
            shape, dtype
        )
    return [np.asarray(x) for x in jax.tree.leaves(restore_newest(run.checkpoints, [STEPS], tree).state)]


@pytest.mark.parametrize(
    ('name', 'more'),
    [
        ('pretrain_masked_lm', ()),
        ('pretrain_span_corruption', ()),
        # Microbatches have the memory of their own rows.
        ('pretrain_transformer_xl', ('GRADIENT_ACCUMULATION = 2',)),
    ],
)
def test_the_loss_falls_and_a_resumed_run_is_the_same(tiny_run, name, more):  # noqa: F811
    assert start(tiny_run, name, *more) == 0
    lines, saved = recorded(tiny_run), arrays(tiny_run)
    losses = [line['loss'] for line in lines if line['kind'] == 'train']
    assert len(losses) == STEPS and np.mean(losses[-5:]) < 0.75 * np.mean(losses[:2])
    # Under an objective the work is that of all tokens of text, however many have a loss.
    train = [line for line in read_json_lines(tiny_run.directory / 'metrics.jsonl') if line['kind'] == 'train']
    work = np.array([line['timing']['mfu'] * line['timing']['seconds'] for line in train])
    tokens = np.array([line['tokens'] for line in train])
    work = work / tokens if name == 'pretrain_transformer_xl' else work
    assert tokens.min() < tokens.max() and np.ptp(work) < 1e-6 * work[0]
    evaluations = [line['loss'] for line in lines if line['kind'] == 'evaluation']
    assert evaluations[1] < evaluations[0] < losses[0]

    shutil.rmtree(step_path(tiny_run.checkpoints, STEPS))
    (tiny_run.directory / 'complete').unlink()
    jax.clear_caches()
    assert start(tiny_run, name, *more) == 0
    assert recorded(tiny_run) == lines
    for once, again in zip(saved, arrays(tiny_run), strict=True):
        np.testing.assert_array_equal(again, once)


def test_what_does_not_go_together_is_named(tiny_run, capsys):  # noqa: F811
    for more, what in {
        'pretrain.Pretrain.samples = @sampling.SamplesConfig()': 'cannot continue a prompt',
        'denoising.SpanCorruption.num_sentinels = 400': '400 of its own, and the model 420',
        "datasets.DataConfig.packing = 'concatenate'": "packing is 'concatenate'",
    }.items():
        code = start(tiny_run, 'pretrain_span_corruption', more)
        shutil.rmtree(tiny_run.directory, ignore_errors=True)
        error = capsys.readouterr().err
        assert (code, what in error) == (2, True), error
    assert start(tiny_run, 'pretrain_transformer_xl', "datasets.DataConfig.order = 'shuffled'") == 2
    assert "order is 'shuffled' and the model has a memory" in capsys.readouterr().err
    imports = (tiny_run.folder / 'imports.gin').read_text()
    (tiny_run.folder / 'imports.gin').write_text(f'{imports}from llm.data.objectives import masking\n')
    tiny_run.arguments.append(f'--gin_file={tiny_run.folder / "imports.gin"}')
    assert tiny_run('datasets.DataConfig.objective = @masking.MaskedLanguageModelling()') == 2
    assert 'the data is for an encoder and the model is a DecoderConfig' in capsys.readouterr().err
