"""Models as GGUF files, against llama.cpp (whose logits tools/gguf_reference.py keeps) and the `gguf` package."""

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from flax import nnx

from llm.data.vocabularies import SpecialTokens, train_vocabulary
from llm.errors import UserError
from llm.interop.gguf.architectures import find
from llm.interop.gguf.files import open_gguf, read_config, write_gguf
from llm.interop.gguf.format import read_header
from llm.interop.gguf.tokenizer import read_tokenizer
from llm.interop.huggingface.family import described
from llm.interop.loading import load_parameters
from llm.models.decoder import Decoder, DecoderConfig
from llm.models.position import RotaryScaling
from llm.parallel.mesh import MeshConfig, make_mesh
from llm.parallel.sharding import AxisRules
from tests.data.vocabularies.small_vocabularies import config as vocabulary_config
from tests.interop.gguf import small_models, small_vocabularies

NAMES = list(small_models.configs())
REFERENCE = Path(__file__).with_name('llama_cpp.npz')
# Largest mean KL divergence between our logits, of exact parameters, and those of llama.cpp.
KL = {'F32': 1e-6, 'F16': 1e-5, 'BF16': 1e-3, 'Q8_0': 1e-3}


@functools.cache
def reference() -> dict[str, np.ndarray]:
    with np.load(REFERENCE) as stored:
        return dict(stored)


@functools.cache
def logits(path: Path) -> np.ndarray:
    """Of the model in a file, at the positions that are kept."""
    model = open_gguf(path)
    parameters = load_parameters(model.pieces, model.specs, make_mesh(MeshConfig(data=1)), AxisRules())
    return forward(model.config, parameters)


def forward(config: DecoderConfig, parameters: Any) -> np.ndarray:
    inputs = np.array([small_models.token_ids()])
    return np.asarray(_forward(config)(parameters, inputs))[0][small_models.KEPT]


@functools.cache
def _forward(config: DecoderConfig) -> Any:
    graph, _ = nnx.split(Decoder(config))
    return jax.jit(lambda parameters, inputs: nnx.merge(graph, parameters)(inputs))


def changed_mixer(config: DecoderConfig, **changes: Any) -> DecoderConfig:
    (layer,) = config.pattern
    return dataclasses.replace(
        config, pattern=(dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, **changes)),)
    )


def mean_kl(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Of the distributions of the next token, in nats."""
    p, q = (jax.nn.log_softmax(x.astype(np.float64)) for x in (ours, theirs))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp('gguf')


@pytest.mark.oracle
@pytest.mark.parametrize(('name', 'dtype'), small_models.files())
def test_llama_cpp_computes_our_logits_from_our_files(folder, name, dtype):
    path = small_models.write(name, dtype, folder)
    kept = reference()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == str(kept[f'{name}/{dtype}/digest'])
    exact = logits(small_models.write(name, 'F32', folder))
    theirs = kept[f'{name}/{dtype}/logits']
    assert theirs.std() > 0.5
    assert mean_kl(exact, theirs) < KL[dtype]
    # Of the rounded parameters as we read them; llama.cpp rounds activations, too, where parameters are not F32.
    assert mean_kl(logits(path), theirs) < KL[dtype]


@pytest.mark.parametrize('name', NAMES)
def test_a_written_file_is_read_as_it_was_and_by_the_gguf_package(folder, name):
    path = small_models.write(name, 'F32', folder)
    model = open_gguf(path)
    assert model.architecture.name == name.split()[0]
    assert model.sequence_length == small_models.LENGTH
    # Llama 3.1's five numbers of scaling, too, of which the file has the factors.
    assert described(model.config) == described(small_models.configs()[name])
    for path_in_tree, array in small_models.parameters(name).items():
        whole = tuple(slice(0, size) for size in array.shape)
        np.testing.assert_allclose(model.pieces.read(path_in_tree, whole, np.float32), array, atol=1e-7, rtol=0)
    theirs = gguf.GGUFReader(path)
    assert {tensor.name for tensor in theirs.tensors} == set(model.file.tensors)
    for tensor in theirs.tensors:
        assert tuple(tensor.shape[::-1]) == model.file.tensors[tensor.name].shape
        assert np.array_equal(tensor.data.reshape(-1), np.asarray(model.file.tensors[tensor.name].read()).reshape(-1))
    for key, value in model.file.metadata.items():
        assert theirs.fields[key].contents() == value


@pytest.mark.parametrize('kind', ['bytes', 'byte_level_bpe', 'sentencepiece_bpe'])
def test_vocabularies_trained_here_go_into_a_file_and_come_back(tmp_path, kind):
    documents = ['The hare ran; the tortoise walked on. élan 🐢 12'] * 40
    size = None if kind == 'bytes' else 290
    settings = vocabulary_config(kind, size, special_tokens=SpecialTokens())
    vocabulary = train_vocabulary(settings, documents)
    config = dataclasses.replace(small_models.configs()['llama'], vocab_size=max(small_models.V, vocabulary.size))
    rows = np.zeros((config.vocab_size, small_models.D), np.float32)
    tree = {**small_models.parameters('llama'), 'embedding/table': rows, 'head/kernel': rows.T}
    path = tmp_path / 'a.gguf'
    template = "{{ 'x' }}"
    write_gguf(
        path,
        config,
        lambda name, index: tree[name][index],
        dtype='F16',
        sequence_length=8,
        vocabulary=vocabulary,
        chat_template=template,
    )
    model = open_gguf(path)
    back = model.read_vocabulary()
    assert model.chat_template == template
    for text in (*documents[:1], small_vocabularies.TEXTS[0], '  two  spaces\n\n', 'Заяц'):
        assert back.encode(text) == vocabulary.encode(text)
        assert back.decode(vocabulary.encode(text)) == text
    assert (back.bos_id, back.eos_id) == (vocabulary.bos_id, vocabulary.eos_id)


def test_models_and_vocabularies_that_do_not_fit_are_refused_before_a_file_is_made(tmp_path):
    config = small_models.configs()['llama']
    settings = {'dtype': 'F32', 'sequence_length': 8, 'vocabulary': small_models.vocabulary()}
    read = small_models.reader('llama')
    for changed, message in (
        (dataclasses.replace(config, embedding_multiplier=2.0), 'of no architecture that can be written'),
        (dataclasses.replace(config, vocab_size=100), 'the vocabulary has 267 tokens and the model 100'),
        (changed_mixer(config, window=8), "as 'phi3', the nearest architecture, a GGUF file would not say"),
        (changed_mixer(config, rotary_scaling=RotaryScaling('dynamic', 2.0, 8)), "scaling 'dynamic' of this kind"),
        (
            dataclasses.replace(small_models.configs()['olmo2'], tied_embeddings=True),
            'embeddings are tied, and llama.cpp has no olmo2 of that kind',
        ),
    ):
        with pytest.raises(UserError, match=message):
            write_gguf(tmp_path / 'a.gguf', changed, read, **settings)
    unigram = train_vocabulary(
        vocabulary_config('sentencepiece_unigram', 264, special_tokens=SpecialTokens()), ['a b c']
    )
    with pytest.raises(UserError, match='unigram models that put a space before a text and have no byte fallback'):
        write_gguf(tmp_path / 'a.gguf', config, read, **{**settings, 'vocabulary': unigram})
    assert not (tmp_path / 'a.gguf').exists()
    large = {**small_models.parameters('llama')}
    large['head/kernel'] = large['head/kernel'] + np.float32(1e6)
    with pytest.raises(UserError, match='output.weight has values that F16 cannot hold'):
        write_gguf(tmp_path / 'a.gguf', config, lambda n, i: large[n][i], **{**settings, 'dtype': 'F16'})


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'general.architecture': 'mamba9'}, "general.architecture is 'mamba9'"),
        ({'llama.embedding_length': 32}, 'the tensors are not those of its config: token_embd.weight has shape'),
        ({'llama.block_count': 2}, 'blk.2.attn_q.weight is unknown'),
        ({'llama.block_count': 4}, 'blk.3.attn_q.weight is missing'),
        ({'llama.expert_count': 8, 'llama.expert_used_count': 2}, 'blk.0.ffn_gate_inp.weight is missing'),
        ({'llama.expert_group_count': 8}, r'the key llama.expert_group_count \(8\) is unknown'),
        ({'llama.rope.scaling.type': 'su'}, "rope.scaling is {'type': 'su'}"),
        ({'llama.rope.scaling.type': 'yarn', 'llama.rope.scaling.yarn_beta_fast': 8.0}, 'rope.scaling is '),
        ({'llama.rope.scaling.type': 'longrope'}, "rope.scaling is {'type': 'longrope'}"),
        ({'llama.rope.scaling.factor': 0.0}, "rope.scaling is {'factor': 0.0}"),
        ({'llama.block_count': 1 << 31}, 'llama.block_count is 2147483648'),
        ({'llama.attention.head_count': 0}, 'num_attention_heads is 0'),
        ({'llama.rope.dimension_count': 8}, 'llama.rope.dimension_count is 8, not 16'),
        ({'llama.attention.head_count': [4, 4, 2]}, 'differs from layer to layer'),
    ],
)
def test_keys_that_are_unknown_or_do_not_fit_are_named(folder, tmp_path, change, message):
    from llm.interop.gguf.blocks import BY_NAME
    from llm.interop.gguf.writing import NewTensor, write_file

    model = open_gguf(small_models.write('llama', 'F32', folder))
    tensors = [NewTensor(t.name, t.shape, BY_NAME['F32'], t.read) for t in model.file.tensors.values()]
    write_file(tmp_path / 'bad.gguf', {**model.file.metadata, **change}, tensors)
    with pytest.raises(UserError, match=message):
        open_gguf(tmp_path / 'bad.gguf')


@pytest.mark.parametrize('name', ['llama', 'jamba'])
def test_nonsense_in_any_key_is_a_user_error_of_one_line_or_changes_nothing(folder, name):
    file = read_header(small_models.write(name, 'F32', folder))
    for key in file.metadata:
        for value in ([], 'x', -1):
            changed = dataclasses.replace(file, metadata={**file.metadata, key: value})
            try:
                read_config(find(changed.metadata, 'a.gguf'), changed.metadata, file.tensors, 'a.gguf')
                read_tokenizer(changed)
            except UserError as error:
                assert '\n' not in str(error)
