"""llama2.c's files: its own model and tokenizer give its own text, and what is written is what was read."""

import dataclasses
import struct

import jax
import numpy as np
import pytest

from llm.data.vocabularies import load_vocabulary
from llm.errors import UserError
from llm.inference.generation import Generator, Prompt
from llm.inference.sampling import SamplingConfig
from llm.interop import llama2c
from llm.interop.loading import load_parameters
from llm.parallel.mesh import MeshConfig, make_mesh
from llm.parallel.sharding import AxisRules

ONE = MeshConfig(data=1)


@pytest.fixture(scope='module')
def stories(dev_data):
    """(folder, model, tokenizer, parameters) of stories260K."""
    folder = dev_data / 'oracles' / 'stories260K'
    model = llama2c.open_model(folder / 'stories260K.bin')
    vocabulary = llama2c.read_tokenizer(folder / 'tok512.bin', model.config.vocab_size)
    parameters = load_parameters(model.pieces, model.specs, make_mesh(ONE), AxisRules())
    return folder, model, vocabulary, parameters


def test_stories260k_tells_its_story(stories):
    folder, model, vocabulary, parameters = stories
    assert (model.config.d_model, model.config.num_layers, model.config.vocab_size, model.sequence_length) == (
        *(64, 5, 512),
        512,
    )
    generator = Generator(model.config, SamplingConfig(temperature=0.0), make_mesh(ONE), AxisRules())
    decoding = generator.start(parameters, [Prompt((vocabulary.bos_id,))], max_new_tokens=200)
    tokens = [token for (new,) in decoding for token in new]
    assert len(tokens) == 200
    text = vocabulary.decode(tokens)
    assert text == (folder / 'expected_greedy_200.txt').read_text()
    # The encoder of run.c, from the ids of the story to its text and back.
    assert vocabulary.encode(text) == tokens


def test_a_written_model_and_tokenizer_are_the_files_that_were_read(stories, tmp_path):
    folder, model, vocabulary, parameters = stories

    def read(path: str, index: tuple[int, ...]) -> np.ndarray:
        node = parameters
        for key in path.split('/'):
            node = node[key]
        return np.asarray(node)[index]

    llama2c.write_model(tmp_path / 'model.bin', model.config, read, sequence_length=512)
    written, original = (path.read_bytes() for path in (tmp_path / 'model.bin', folder / 'stories260K.bin'))
    # The tables of rotation, 2 * 512 * 4 floats at the end, differ in the last place of some cosines.
    tables = 4 * 2 * 512 * 4
    assert written[:-tables] == original[:-tables]
    ends = [np.frombuffer(content[-tables:], '<f4') for content in (written, original)]
    np.testing.assert_allclose(*ends, atol=1e-4)
    llama2c.write_tokenizer(tmp_path / 'tokenizer.bin', vocabulary)
    assert (tmp_path / 'tokenizer.bin').read_bytes() == (folder / 'tok512.bin').read_bytes()
    vocabulary.save(tmp_path / 'vocabulary')
    assert load_vocabulary(tmp_path) == vocabulary


def test_an_own_output_matrix_is_told_by_the_sign(stories, tmp_path):
    _, model, _, parameters = stories
    config = dataclasses.replace(model.config, tied_embeddings=False)
    kernel = np.random.default_rng(0).standard_normal((64, 512), np.float32)
    tree = {**parameters, 'head': {'kernel': kernel}}

    def read(path: str, index: tuple[int, ...]) -> np.ndarray:
        node = tree
        for key in path.split('/'):
            node = node[key]
        return np.asarray(node)[index]

    llama2c.write_model(tmp_path / 'a.bin', config, read, sequence_length=16)
    assert struct.unpack('<7i', (tmp_path / 'a.bin').read_bytes()[:28])[5] == -512
    back = llama2c.open_model(tmp_path / 'a.bin')
    assert back.config == config
    loaded = load_parameters(back.pieces, back.specs, make_mesh(ONE), AxisRules())
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(tree), strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda content: content[:20], 'is too short for a model'),
        (lambda content: content[:-4], r'the file has 1,056,536 bytes, its header asks for 1,056,540'),
        (lambda content: content + b'\0', r'the file has 1,056,541 bytes'),
        (lambda content: struct.pack('<7i', 64, 172, 5, 8, 3, 512, 512) + content[28:], 'is no model of llama2.c'),
        (lambda content: struct.pack('<7i', *[2**31 - 1] * 7) + content[28:], 'is no model of llama2.c'),
        (lambda content: struct.pack('<7i', *[1 << 23] * 7) + content[28:], 'is no model of llama2.c|asks for'),
        (lambda content: b'ak42' + content[4:], 'is no model of llama2.c'),
    ],
)
def test_a_damaged_model_is_refused_before_it_is_read(stories, tmp_path, damage, message):
    (tmp_path / 'bad.bin').write_bytes(damage((stories[0] / 'stories260K.bin').read_bytes()))
    with pytest.raises(UserError, match=rf'bad\.bin: .*({message})'):
        llama2c.open_model(tmp_path / 'bad.bin')


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda content: content[:-1], 'token 511 has length'),
        (lambda content: content[:100], 'ends before token|has length'),
        (lambda content: content + b'\0', 'holds more than the 512 tokens'),
        (lambda content: content[:8] + struct.pack('<i', -5) + content[12:], 'token 0 has length -5'),
        (lambda content: content.replace(b'<0x41>', b'<0x42>'), "token 68 is '<0x42>', not a byte"),
    ],
)
def test_a_damaged_tokenizer_is_refused(stories, tmp_path, damage, message):
    (tmp_path / 'bad.bin').write_bytes(damage((stories[0] / 'tok512.bin').read_bytes()))
    with pytest.raises(UserError, match=rf'bad\.bin: .*({message})'):
        llama2c.read_tokenizer(tmp_path / 'bad.bin', 512)


def test_another_model_is_not_written(stories, tmp_path):
    _, model, _, _ = stories
    with pytest.raises(UserError, match='is not the Llama that run.c computes'):
        config = dataclasses.replace(model.config, embedding_multiplier=2.0)
        llama2c.write_model(tmp_path / 'a.bin', config, lambda path, index: np.zeros(1), sequence_length=1)
    assert not (tmp_path / 'a.bin').exists()
