"""The convert job from a Hugging Face directory to a run that others start from, and back."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from llm.configuration import Invocation, load_job
from llm.data.vocabularies import ByteVocabulary
from llm.errors import UserError
from llm.inference.sampling import SamplingConfig
from llm.interop.huggingface.directory import open_directory
from llm.interop.loading import load_parameters
from llm.interop.safetensors import open_checkpoint
from llm.jobs.convert import MODEL_PIECE, Convert
from llm.jobs.generate import Generate
from llm.jobs.trained_model import open_trained_model
from llm.main import main
from llm.parallel.mesh import MeshConfig, make_mesh
from llm.parallel.sharding import AxisRules
from llm.training.checkpoints import restore_parameters, streaming
from tests.interop.huggingface import models

pytestmark = pytest.mark.oracle

RUN = Invocation(dry_run=False, operative_config='', command=(), config_files=())
ONE = MeshConfig(data=1)
VOCABULARY = ByteVocabulary()


@pytest.fixture(scope='module')
def source(tmp_path_factory) -> Path:
    """A Llama of transformers over bytes, with a vocabulary."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp('huggingface') / 'llama'
    torch.manual_seed(0)
    settings = models.GROUPED | models.rope() | models.TOKENS | {'vocab_size': 264, 'max_position_embeddings': 128}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    with models.quiet():
        model.save_pretrained(directory)
    VOCABULARY.save(directory)
    return directory


@pytest.fixture(scope='module')
def run(source, tmp_path_factory) -> Path:
    """It, converted."""
    directory = tmp_path_factory.mktemp('runs') / 'converted'
    Convert(str(source), str(directory))(RUN)
    return directory


@pytest.fixture(autouse=True)
def _compilation_cache(monkeypatch, tmp_path):
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'compiled'))


def test_run_directory_has_the_model_its_vocabulary_and_its_length(source, run):
    model = open_trained_model(run)
    assert model.vocabulary == VOCABULARY and model.sequence_length == 128
    checkpoint = open_directory(source)
    assert model.config == checkpoint.config
    expected = load_parameters(checkpoint.pieces, checkpoint.specs, make_mesh(ONE), AxisRules())
    jax.tree.map(np.testing.assert_array_equal, model.restore(make_mesh(ONE), AxisRules()).state, expected)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    jax.tree.map(np.testing.assert_array_equal, model.restore(mesh, AxisRules()).state, expected)


def test_generate_continues_as_transformers_does(source, run, tmp_path):
    import torch

    oracle = models.load(source)
    prompt = [VOCABULARY.bos_id, *VOCABULARY.encode('Call me')]
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(12):
            # The generate job never chooses ids that the vocabulary does not have.
            ids = torch.cat([ids, oracle(ids).logits[:, -1:, : VOCABULARY.size].argmax(-1)], dim=1)
    made = ids[0, len(prompt) :].tolist()
    assert VOCABULARY.eos_id not in made
    output = tmp_path / 'out.jsonl'
    settings = {'max_new_tokens': 12, 'sampling': SamplingConfig(temperature=0.0), 'mesh': ONE}
    Generate(str(run), prompt='Call me', output_file=str(output), **settings)(RUN)
    assert json.loads(output.read_text())['continuation'] == VOCABULARY.decode(made)


def test_back_again_the_tensors_have_the_same_bits(source, run, tmp_path):
    back = tmp_path / 'back'
    Convert(str(run), str(back), to='hugging_face', shard_bytes=30_000)(RUN)
    before, after = open_checkpoint(source), open_checkpoint(back)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].code == tensor.code
        np.testing.assert_array_equal(after[name].read(), tensor.read())
    settings = json.loads((back / 'config.json').read_text())
    assert settings['eos_token_id'] == VOCABULARY.eos_id and settings['max_position_embeddings'] == 128
    again = open_trained_model_of(back, tmp_path)
    # Of the tokenizer.json that is written: other rules, the same ids.
    assert again.vocabulary.encode('Äsop 🐢') == VOCABULARY.encode('Äsop 🐢')
    assert (again.vocabulary.special_ids, again.vocabulary.roles) == (VOCABULARY.special_ids, VOCABULARY.roles)


def open_trained_model_of(source: Path, tmp_path: Path):
    """A Hugging Face directory converted once more."""
    Convert(str(source), str(tmp_path / 'again'))(RUN)
    return open_trained_model(tmp_path / 'again')


def test_dtype_is_that_asked_for(source, tmp_path):
    Convert(str(source), str(tmp_path / 'half'), dtype='bfloat16')(RUN)
    arrays = json.loads((tmp_path / 'half/checkpoints/step_000000000/metadata.json').read_text())['arrays']
    assert {dtype for dtype, _ in arrays.values()} == {'bfloat16'}
    Convert(str(tmp_path / 'half'), str(tmp_path / 'out'), to='hugging_face')(RUN)
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / 'out')
    for name, tensor in after.items():
        assert tensor.code == 'BF16'
        np.testing.assert_array_equal(tensor.read(), before[name].read().astype(tensor.dtype))


def test_pretrain_starts_from_it_by_the_piece_that_describes_it(run, tiny_run):
    preset = "include 'gin_configs/models/tiny.gin'"
    lines = (tiny_run.folder / 'run.gin').read_text().replace(preset, f"include '{run / MODEL_PIECE}'").splitlines()
    sizes = ('VOCAB_SIZE', 'D_MODEL', 'NUM_HEADS', 'NUM_KV_HEADS', 'HEAD_DIM', 'D_FF')
    kept = [line for line in lines if not line.startswith(sizes)]
    (tiny_run.folder / 'run.gin').write_text('\n'.join([*kept, f'INITIAL_PARAMETERS = {str(run)!r}', '']))
    assert tiny_run('TOTAL_STEPS = 2', 'LEARNING_RATE = 1e-9') == 0
    model = open_trained_model(run)
    start = model.restore(make_mesh(ONE), AxisRules()).state
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), start)
    trained = restore_parameters(tiny_run.directory, abstract).state
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), trained, start)


def test_run_of_ours_loads_in_transformers(tiny_run, tmp_path):
    assert tiny_run('TOTAL_STEPS = 2') == 0
    Convert(str(tiny_run.directory), str(tmp_path / 'out'), to='hugging_face')(RUN)
    assert type(models.load(tmp_path / 'out')).__name__ == 'LlamaForCausalLM'


def test_large_arrays_are_written_in_pieces(source, run, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, 'PIECE_BYTES', 5000)
    held: list[int] = []
    read = streaming.StreamedArray.piece.fget
    monkeypatch.setattr(
        streaming.StreamedArray,
        'piece',
        property(lambda self: held.append(read(self) * self.nbytes // self.shape[0]) or read(self)),
    )
    Convert(str(source), str(tmp_path / 'pieces'))(RUN)
    layer = 32 * 48 * 4  # the largest that has to be made at once: a matrix of one layer
    assert max(held) == layer
    whole, pieces = (
        open_trained_model(path).restore(make_mesh(ONE), AxisRules()).state for path in (run, tmp_path / 'pieces')
    )
    jax.tree.map(np.testing.assert_array_equal, whole, pieces)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'source': 'nowhere'}, 'neither a run directory'),
        ({'vocabulary': 'nowhere'}, 'no vocabulary is here'),
        ({'destination': '{source}'}, 'not empty'),
        ({'to': 'torch'}, "Convert.to is 'torch'"),
        ({'dtype': 'int8'}, "Convert.dtype is 'int8'"),
    ],
)
def test_mistakes_are_said(source, tmp_path, changes, message):
    arguments = {'source': str(source), 'destination': str(tmp_path / 'new')} | changes
    arguments['destination'] = arguments['destination'].format(source=source)
    with pytest.raises(UserError, match=message):
        Convert(**arguments)(RUN)
    assert not (tmp_path / 'new').exists()


def test_model_that_no_family_can_describe_is_refused_with_the_difference(tiny_run, tmp_path, capsys):
    assert tiny_run('TOTAL_STEPS = 2', 'attention.AttentionConfig.sinks = True') == 0
    job = f'JOB = @convert.Convert()\nconvert.Convert.source = {str(tiny_run.directory)!r}'
    (tmp_path / 'convert.gin').write_text(
        f'from __gin__ import dynamic_registration\nfrom llm.jobs import convert\n{job}\n'
        f"convert.Convert.destination = {str(tmp_path / 'out')!r}\nconvert.Convert.to = 'hugging_face'\n"
    )
    assert load_job([str(tmp_path / 'convert.gin')])
    assert main([f'--gin_file={tmp_path / "convert.gin"}']) == 2
    assert 'closest of all families: pattern[0].mixer.sinks is True, not False' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()
