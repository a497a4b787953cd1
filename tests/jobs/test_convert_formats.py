"""The convert job with GGUF files and those of llama2.c."""

import json

import numpy as np
import pytest

from llm.configuration import Invocation
from llm.errors import UserError
from llm.inference.sampling import SamplingConfig
from llm.interop.gguf.files import open_gguf
from llm.jobs.convert import MODEL_PIECE, Convert
from llm.jobs.generate import Generate
from llm.jobs.trained_model import open_trained_model
from llm.parallel.mesh import MeshConfig
from tests.interop.gguf import small_models

RUN = Invocation(dry_run=False, operative_config='', command=(), config_files=())


@pytest.fixture(scope='module')
def stories(dev_data, tmp_path_factory):
    """(folder, run directory) of stories260K."""
    folder, run = dev_data / 'oracles' / 'stories260K', tmp_path_factory.mktemp('runs') / 'stories'
    Convert(str(folder / 'stories260K.bin'), str(run), vocabulary=str(folder / 'tok512.bin'))(RUN)
    return folder, run


def test_stories260k_is_a_run_and_becomes_its_own_file_again(stories, tmp_path):
    folder, run = stories
    output = tmp_path / 'out.jsonl'
    settings = {'max_new_tokens': 200, 'sampling': SamplingConfig(temperature=0.0), 'mesh': MeshConfig(data=1)}
    Generate(str(run), output_file=str(output), **settings)(RUN)
    expected = (folder / 'expected_greedy_200.txt').read_text()
    assert json.loads(output.read_text())['continuation'].lstrip(' ') == expected
    Convert(str(run), str(tmp_path / 'back'), to='llama2c')(RUN)
    assert (tmp_path / 'back' / 'tokenizer.bin').read_bytes() == (folder / 'tok512.bin').read_bytes()
    tables = 2 * 512 * 4 * 4  # of rotation, which no program reads
    original = (folder / 'stories260K.bin').read_bytes()
    assert (tmp_path / 'back' / 'model.bin').read_bytes()[:-tables] == original[:-tables]


def test_training_goes_on_from_stories260k(stories, tiny_run):
    _, run = stories
    preset = "include 'gin_configs/models/tiny.gin'"
    lines = (tiny_run.folder / 'run.gin').read_text().replace(preset, f"include '{run / MODEL_PIECE}'").splitlines()
    sizes = ('VOCAB_SIZE', 'D_MODEL', 'NUM_HEADS', 'NUM_KV_HEADS', 'HEAD_DIM', 'D_FF')
    kept = [line for line in lines if not line.startswith((*sizes, 'training.VocabularyConfig'))]
    kept += [f'INITIAL_PARAMETERS = {str(run)!r}', f'VOCABULARY = {str(run)!r}', '']
    (tiny_run.folder / 'run.gin').write_text('\n'.join(kept))
    assert tiny_run('TOTAL_STEPS = 2') == 0
    before, after = open_trained_model(run), open_trained_model(tiny_run.directory)
    assert after.vocabulary == before.vocabulary
    assert after.steps[-1] == 2


@pytest.mark.parametrize('name', ['llama', 'gpt2'])
def test_a_gguf_file_becomes_a_run_and_the_same_file_again(tmp_path, name):
    source = small_models.write(name, 'F32', tmp_path)
    Convert(str(source), str(tmp_path / 'run'))(RUN)
    target = tmp_path / f'{name}.gguf'
    Convert(str(tmp_path / 'run'), str(target), to='gguf')(RUN)
    before, after = open_gguf(source), open_gguf(target)
    assert before.config == after.config
    assert before.read_vocabulary() == after.read_vocabulary()
    for path in before.file.tensors:
        assert np.array_equal(before.file.tensors[path].read(), after.file.tensors[path].read())
    Convert(str(tmp_path / 'run'), str(tmp_path / 'small.gguf'), to='gguf', block_type='Q8_0')(RUN)
    assert {tensor.type.name for tensor in open_gguf(tmp_path / 'small.gguf').file.tensors.values()} == {'F32', 'Q8_0'}
    with pytest.raises(UserError, match='is there already'):
        Convert(str(tmp_path / 'run'), str(target), to='gguf')(RUN)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'to': 'gguf'}, 'a GGUF file holds its vocabulary'),
        ({'to': 'run', 'block_type': 'Q8_0'}, "Convert.block_type is 'Q8_0'"),
        ({'source': 'nowhere.bin'}, 'nowhere.bin: cannot be read'),
        ({'source': 'nowhere.gguf'}, 'nowhere.gguf: cannot be read'),
        ({'vocabulary': 'nowhere.bin'}, 'nowhere.bin: cannot be read'),
    ],
)
def test_mistakes_are_said(stories, tmp_path, changes, message):
    source = str(stories[0] / 'stories260K.bin')
    with pytest.raises(UserError, match=message):
        Convert(**{'source': source, 'destination': str(tmp_path / 'new')} | changes)(RUN)
    assert not (tmp_path / 'new').exists()
