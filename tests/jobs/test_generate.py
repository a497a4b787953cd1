"""The generate job on a run directory as pretrain leaves it, with a model of random parameters."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from llm.configuration import Invocation, render
from llm.data.datasets import Component, DataConfig
from llm.data.sources import StandardLibrary
from llm.data.vocabularies import ByteVocabulary, SpecialTokens, VocabularyConfig
from llm.errors import UserError
from llm.inference.sampling import SamplingConfig
from llm.jobs.generate import Generate
from llm.jobs.pretrain import Pretrain
from llm.jobs.prompts import read_prompts
from llm.jobs.trained_model import open_trained_model
from llm.models.initialization import Initialization
from llm.parallel.mesh import MeshConfig
from llm.training.checkpoints import CheckpointConfig, Checkpointer
from llm.training.loop import LoopConfig
from llm.training.optimizers import OptimizerConfig
from llm.training.step import StepConfig
from llm.training.trainer import Trainer
from tests.models.small_decoders import decoder_config

VOCABULARY = ByteVocabulary()
RUN = Invocation(dry_run=False, operative_config='', command=(), config_files=())
ONE_DEVICE = MeshConfig(data=1)
SAMPLING = SamplingConfig()  # compiles sooner than the job's own


def pretrain(directory, **model):
    # Initial parameters so large that the model is sure of each next token, and no two prompts go on alike.
    model = decoder_config(vocab_size=264, num_layers=1, initialization=Initialization(std=0.6), **model)
    return Pretrain(
        str(directory),
        model,
        DataConfig((Component('library', StandardLibrary()),)),
        VocabularyConfig('bytes', None),
        OptimizerConfig(),
        StepConfig(batch_size=8, sequence_length=64),
        LoopConfig(total_steps=20),
        ONE_DEVICE,
    )


def write_run(directory, *, steps=(10, 20), vocabulary=VOCABULARY, change=None, **model):
    """A run directory with checkpoints of other parameters at each step, changed by `change(path, array)`."""
    job = pretrain(directory, **model)
    directory.mkdir()
    (directory / 'config.gin').write_text(render(job))
    VOCABULARY.save(directory / 'vocabulary')
    with Checkpointer(directory / 'checkpoints', CheckpointConfig(asynchronous=False)) as checkpointer:
        for step in steps:
            trainer = Trainer(job.model, job.optimizer, dataclasses.replace(job.step, seed=step), 20, ONE_DEVICE)
            state = trainer.state_dict(trainer.fresh_state())
            if change is not None:
                state['parameters'] = jax.tree.map_with_path(
                    lambda path, x: change(jax.tree_util.keystr(path, simple=True, separator='/'), x),
                    state['parameters'],
                )
            checkpointer.save(step, state, {'vocabulary': vocabulary.digest})
    return directory


@pytest.fixture(scope='module')
def run_directory(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp('runs') / 'run')


@pytest.fixture(autouse=True)
def _no_compilation_cache(monkeypatch, tmp_path):
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'compiled'))


def generate(run_directory, **settings):
    """Run the job, with cheap settings."""
    settings = {'max_new_tokens': 24, 'sampling': SAMPLING, 'mesh': ONE_DEVICE, **settings}
    Generate(str(run_directory), **settings)(RUN)


@pytest.fixture(scope='module')
def generate_lines(run_directory, tmp_path_factory):
    """The objects in the file that the job writes."""

    def generate_lines(**settings):
        path = tmp_path_factory.mktemp('out') / 'new' / 'continuations.jsonl'
        generate(run_directory, output_file=str(path), **settings)
        return [json.loads(line) for line in path.read_text().strip().split('\n')]

    return generate_lines


@pytest.fixture(scope='module')
def lines(generate_lines):
    """Two samples of one prompt."""
    return generate_lines(prompt='def f', num_samples=2, seed=3)


def visible(text):
    """Control characters as the terminal shows them."""
    pictures = {chr(code): chr(0x2400 + code) for code in range(32) if code not in (9, 10)}
    pictures |= {'\x7f': '\u2421', **{chr(code): '\ufffd' for code in range(0x80, 0xA0)}}
    return ''.join(pictures.get(character, character) for character in text)


def test_the_file(lines):
    assert [(line['index'], line['sample'], line['prompt']) for line in lines] == [(0, 0, 'def f'), (0, 1, 'def f')]
    assert [line['end'] for line in lines] == ['length'] * 2
    assert lines[0]['continuation'] != lines[1]['continuation']


def test_the_terminal_shows_the_same_text_and_no_control_characters(run_directory, lines, capsys):
    generate(run_directory, prompt='def f', seed=3)
    assert capsys.readouterr().out == visible(f'def f{lines[0]["continuation"]}\n')


def test_prompts_of_a_file_and_samples_of_each(run_directory, generate_lines, tmp_path, capsys):
    (tmp_path / 'prompts.txt').write_text('a prompt of some length\n\nb\n')
    settings = {'prompt_file': str(tmp_path / 'prompts.txt'), 'num_samples': 3}
    lines = generate_lines(**settings, batch_size=4)  # the samples of the second prompt are in two batches
    assert capsys.readouterr().out.endswith('continuations.jsonl: 6 continuations of 2 prompts\n')
    texts = ('a prompt of some length', 'b')
    places = [(line['index'], line['sample'], line['prompt']) for line in lines]
    assert places == [(i, sample, text) for i, text in enumerate(texts) for sample in range(3)]
    assert len({line['continuation'] for line in lines}) == 6

    generate(run_directory, **settings, batch_size=2)
    assert capsys.readouterr().out == visible(
        ''.join(
            f'--- prompt {line["index"] + 1}, sample {line["sample"] + 1} ---\n{line["prompt"]}{line["continuation"]}\n'
            for line in lines
        )
    )


def test_stop_strings_end_a_continuation_and_are_not_shown(generate_lines, lines):
    text = lines[0]['continuation']
    stop = text[5:7]
    cut, other = generate_lines(prompt='def f', num_samples=2, seed=3, stop=('not there', stop))
    assert cut['continuation'] == text[: text.index(stop)]
    assert cut['end'] == 'stop string'
    assert other == lines[1]


def test_the_end_of_the_document_ends_a_continuation(generate_lines):
    lines = generate_lines(prompt='', num_samples=40, batch_size=40, sampling=SamplingConfig(temperature=30.0))
    ended = [line for line in lines if line['end'] == 'end of document']
    assert ended
    assert all(len(line['continuation']) < 24 for line in ended)


def test_greedy_is_the_argmax_of_the_newest_checkpoint(generate_lines, run_directory):
    from flax import nnx

    from llm.models.decoder import Decoder
    from llm.parallel.mesh import make_mesh
    from llm.parallel.sharding import AxisRules

    (line,) = generate_lines(prompt='ab', sampling=SamplingConfig(temperature=0), max_new_tokens=8)
    model = open_trained_model(run_directory)
    assert (model.steps, model.sequence_length) == ((10, 20), 64)
    restored = model.restore(make_mesh(ONE_DEVICE), AxisRules())
    assert restored.step == 20
    forward = nnx.merge(nnx.split(Decoder(model.config))[0], restored.state)
    ids = [VOCABULARY.bos_id, *VOCABULARY.encode('ab')]
    logits = jax.jit(lambda model, inputs: model(inputs))
    for _ in range(8):
        inputs = np.array([ids + [0] * (11 - len(ids))])
        ids.append(int(logits(forward, inputs)[0, len(ids) - 1, : VOCABULARY.size].argmax()))
    assert line['continuation'] == VOCABULARY.decode(ids[3:])
    older = model.restore(make_mesh(ONE_DEVICE), AxisRules(), step=10)
    assert older.step == 10
    assert not np.array_equal(older.state['embedding']['table'], restored.state['embedding']['table'])


def test_a_mesh_gives_what_one_device_gives(generate_lines, lines):
    assert generate_lines(prompt='def f', num_samples=2, seed=3, mesh=MeshConfig(data=2, tensor=2)) == lines


def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys):
    directory = write_run(tmp_path / 'run')
    victim = next(path for path in (directory / 'checkpoints/step_000000020/state').rglob('*') if path.is_file())
    victim.write_bytes(b'')
    generate(directory, prompt='a', max_new_tokens=1)
    assert 'step_000000020' in capsys.readouterr().err


def test_dry_run_reads_no_checkpoint(run_directory, capsys):
    job = Generate(str(run_directory), 'def', num_samples=2, stop=('\n\n',))
    job(dataclasses.replace(RUN, dry_run=True))
    assert capsys.readouterr().out == (
        f'model       {run_directory}: 11,184 parameters, checkpoint of step 20\n'
        'vocabulary  bytes, 259 tokens\n'
        'prompts     1 of up to 4 tokens, 2 continuations each of up to 200 tokens, 2 at a time\n'
        'sampling    temperature 0.8, top_p 0.95, seed 0\n'
        "until       the end of the document, '\\n\\n'\n"
        'cache       0.1 MB\n'
        'output      the terminal\n'
    )


def test_more_than_the_model_was_trained_on_is_said(run_directory, capsys):
    generate(run_directory, prompt='abc', max_new_tokens=61)
    assert 'warning: texts of up to 65 tokens, but the model was trained on 64' in capsys.readouterr().err


def test_another_vocabulary_is_refused(tmp_path):
    directory = write_run(tmp_path / 'run', steps=(20,), vocabulary=ByteVocabulary(SpecialTokens(extra=('<|user|>',))))
    with pytest.raises(UserError, match='the checkpoint of step 20 was trained with another vocabulary'):
        Generate(str(directory), 'a', mesh=ONE_DEVICE)(RUN)
    (directory / 'vocabulary' / 'vocabulary.json').unlink()
    ByteVocabulary(SpecialTokens(extra=tuple('abcdef'))).save(directory / 'vocabulary')
    with pytest.raises(UserError, match='the vocabulary has 265 tokens and the model 264'):
        Generate(str(directory), 'a', mesh=ONE_DEVICE)(RUN)


def test_what_is_no_trained_model(tmp_path, run_directory):
    with pytest.raises(UserError, match=r'not the directory of a run: it has no config\.gin'):
        Generate(str(tmp_path), 'a')(RUN)
    with pytest.raises(UserError, match=r'there is no checkpoint of step 15\. There are those of 10, 20'):
        Generate(str(run_directory), 'a', checkpoint_step=15, mesh=ONE_DEVICE)(RUN)
    (tmp_path / 'config.gin').write_text(render(Generate(str(run_directory))))
    with pytest.raises(UserError, match='the job of this run, Generate, trains no model'):
        Generate(str(tmp_path), 'a')(RUN)


def test_no_prompt_runs_when_one_is_too_long(tmp_path):
    directory = write_run(tmp_path / 'run', steps=(1,), position='learned', max_positions=64)
    (tmp_path / 'prompts.txt').write_text(f'ok\n{"much " * 13}\n')
    job = Generate(str(directory), prompt_file=str(tmp_path / 'prompts.txt'), batch_size=1, mesh=ONE_DEVICE)
    with pytest.raises(UserError, match='prompt 2: the prompt has 66 tokens, but the model has 64 positions'):
        job(RUN)


def test_an_output_file_is_never_overwritten(run_directory, tmp_path):
    path = tmp_path / 'out.jsonl'
    path.write_text('mine')
    with pytest.raises(UserError, match='the output file exists already'):
        Generate(str(run_directory), 'a', output_file=str(path), mesh=ONE_DEVICE)(RUN)
    assert path.read_text() == 'mine'


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'max_new_tokens': 0}, 'Generate.max_new_tokens is 0'),
        ({'num_samples': 0}, 'Generate.num_samples is 0'),
        ({'batch_size': -1}, 'Generate.batch_size is -1'),
        ({'seed': -1}, 'Generate.seed is -1'),
        ({'stop': ('a', '')}, 'a stop string is empty'),
        ({'prompt': 'a', 'prompt_file': 'b'}, 'prompt_file and prompt are both set'),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(UserError, match=message):
        Generate('run', **settings)


def test_prompt_files(tmp_path):
    (tmp_path / 'a.txt').write_text('\ufeff one \n\n\t\ntwo\x0cthree\r\n', newline='')
    assert read_prompts(tmp_path / 'a.txt', 'prompt') == [' one ', 'two\x0cthree']
    (tmp_path / 'a.jsonl').write_text('{"q": "two\\nlines", "id": 3}\n\n{"q": ""}\n')
    assert read_prompts(tmp_path / 'a.jsonl', 'q') == ['two\nlines', '']


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('a.txt', b'\n \n', 'a.txt: there is no prompt in this file'),
        ('a.txt', b'one\ntw\xff\n', 'a.txt:2: this is not UTF-8 text'),
        ('a.jsonl', b'{"prompt": "a"}\n{"prompt"', 'a.jsonl:2: this is not JSON'),
        (
            'a.jsonl',
            b'{"text": "a", "id": 1}',
            "a.jsonl:1: this is no object with a string in 'prompt', but dict with",
        ),
        ('a.jsonl', b'\n["a"]', "a.jsonl:2: this is no object with a string in 'prompt', but list. "),
        ('missing.txt', None, 'missing.txt: cannot read the prompts'),
    ],
)
def test_prompt_files_that_cannot_be_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message.replace('[', r'\[')):
        read_prompts(tmp_path / name, 'prompt')


def test_the_run_file(run_directory, tmp_path):
    """From the command line, into a pipe, with characters in the prompt that a shell or gin could mistake."""
    done = subprocess.run(
        [
            *(sys.executable, '-m', 'llm.main', '--gin_file=gin_configs/runs/generate.gin'),
            f'--gin_bindings=RUN_DIRECTORY={str(run_directory)!r}',
            '--gin_bindings=PROMPT="def é(%x, @y"',
            *('--gin_bindings=MAX_NEW_TOKENS=3', '--gin_bindings=TEMPERATURE=0'),
        ],
        env={**os.environ, 'JAX_COMPILATION_CACHE_DIR': str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('def é(%x, @y')
