"""Our vocabularies in Hugging Face directories, and other files found there: exact ids through other libraries."""

import gzip
import io
import json

import pytest
import sentencepiece
import tokenizers

from llm.data.vocabularies import (
    ByteLevelBPE,
    SentencePieceVocabulary,
    TiktokenVocabulary,
    TokenizerJson,
    load_vocabulary,
    train_vocabulary,
    write_vocabulary,
)
from llm.errors import UserError
from tests.data.vocabularies.small_vocabularies import config

TEXTS = [
    '',
    ' ',
    'def f(x):\n    return x',
    '  élan  🐢🐇 ½ \t\n',
    "It's",
    'ﬁ №',
    'Заяц и черепаха. うさぎ',
    '\r\n\r\n a',
    '𐂃' * 3,
]


def test_every_kind_trained_here_has_its_ids_in_tokenizers_and_comes_back(vocabulary, documents, tmp_path):
    write_vocabulary(vocabulary, tmp_path, max_length=512)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
    for text in [*TEXTS, *documents[:10]]:
        ids = vocabulary.encode(text)
        assert theirs.encode(text, add_special_tokens=False).ids == ids
        assert theirs.encode(text).ids == [vocabulary.bos_id, *ids]
        assert theirs.decode(ids) == text
        assert theirs.encode(f'{text}<eos>').ids[-1] == vocabulary.eos_id
    back = load_vocabulary(tmp_path)
    assert isinstance(back, TokenizerJson)
    assert (back.size, back.special_ids, back.roles) == (vocabulary.size, vocabulary.special_ids, vocabulary.roles)
    assert back.token_bytes() == vocabulary.token_bytes()
    marked = 'a<eos> é🐢<|user|>\nb'
    assert back.encode_marked(marked)[0] == vocabulary.encode_marked(marked)[0]


@pytest.mark.oracle
def test_transformers_makes_the_same_tokenizer_of_what_is_written(vocabulary, documents, tmp_path):
    import transformers

    write_vocabulary(vocabulary, tmp_path, max_length=512)
    for theirs in (
        transformers.AutoTokenizer.from_pretrained(tmp_path),
        transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path),
    ):
        assert len(theirs) == vocabulary.size
        assert (theirs.bos_token_id, theirs.eos_token_id) == (vocabulary.bos_id, vocabulary.eos_id)
        assert (theirs.pad_token_id, theirs.unk_token_id) == (vocabulary.pad_id, vocabulary.unk_id)
        assert theirs.model_max_length == 512
        for text in [*TEXTS, *documents[:3]]:
            assert theirs.encode(text, add_special_tokens=False) == vocabulary.encode(text)
            assert theirs.decode(vocabulary.encode(text)) == text


@pytest.fixture(scope='module')
def cl100k(dev_data, tmp_path_factory):
    path = tmp_path_factory.mktemp('cl100k') / 'cl100k_base.tiktoken'
    path.write_bytes(gzip.decompress((dev_data / 'tokenizers' / 'cl100k_base.tiktoken.gz').read_bytes()))
    return path


def test_ranks_of_tiktoken_are_recognised_and_give_published_ids(cl100k):
    vocabulary = load_vocabulary(cl100k)
    assert isinstance(vocabulary, TiktokenVocabulary)
    assert (vocabulary.encoding, vocabulary.size, vocabulary.eos_id) == ('cl100k_base', 100_277, 100_257)
    # From the README and the tests of tiktoken.
    assert vocabulary.encode('hello world') == [15339, 1917]
    assert vocabulary.encode('rer') == [38149]
    assert vocabulary.encode("'rer") == [2351, 81]
    assert vocabulary.encode('today\n ') == [31213, 198, 220]
    assert vocabulary.encode('today\n \n') == [31213, 27907]
    assert vocabulary.encode('👍') == [9468, 239, 235]
    assert vocabulary.encode_marked('hello <|endoftext|>')[0] == [15339, 220, 100257]
    assert vocabulary.encode('<|endoftext|>') == [27, 91, 8862, 728, 428, 91, 29]
    assert load_vocabulary(cl100k.parent) == vocabulary


def test_ranks_of_tiktoken_are_the_same_saved_and_as_a_tokenizer_json(cl100k, dev_data, tmp_path):
    vocabulary = load_vocabulary(cl100k)
    vocabulary.save(tmp_path / 'saved')
    assert load_vocabulary(tmp_path / 'saved') == vocabulary
    write_vocabulary(vocabulary, tmp_path / 'written')
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / 'written' / 'tokenizer.json'))
    texts = [gzip.decompress(path.read_bytes()).decode()[:200_000] for path in sorted((dev_data / 'text').glob('*.gz'))]
    for text in [*TEXTS, *texts]:
        ids = vocabulary.encode(text)
        assert theirs.encode(text).ids == ids
        assert vocabulary.decode(ids) == text
    assert theirs.encode('<|endofprompt|>').ids == [100_276]
    whole = vocabulary.encode_segment(texts[0]).tolist()
    cuts = [i for i in range(1, len(texts[0])) if vocabulary.boundary.match(texts[0], i)][::997]
    assert len(cuts) > 20
    for cut in cuts:
        assert vocabulary.encode(texts[0][:cut]) + vocabulary.encode(texts[0][cut:]) == whole


def test_llama_3_ranks_under_the_name_of_a_sentencepiece_model(cl100k, tmp_path):
    """Ranks of cl100k with made-up ones after them, as many as Llama 3 has; it has the same split."""
    lines = cl100k.read_bytes().splitlines()
    import base64

    lines += [base64.b64encode(b'made up %d' % i) + b' %d' % i for i in range(len(lines), 128_000)]
    (tmp_path / 'tokenizer.model').write_bytes(b'\n'.join(lines))
    vocabulary = load_vocabulary(tmp_path)
    assert (vocabulary.encoding, vocabulary.size) == ('llama3', 128_256)
    assert (vocabulary.bos_id, vocabulary.eos_id) == (128_000, 128_001)
    assert vocabulary.special_ids['<|eot_id|>'] == 128_009
    assert vocabulary.special_ids['<|python_tag|>'] == 128_010
    assert vocabulary.special_ids['<|reserved_special_token_247|>'] == 128_255
    assert vocabulary.encode("today\n \nDON'T") == load_vocabulary(cl100k).encode("today\n \nDON'T")


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'AA== 0\nAQ== 1\n', 'lacks one of the 256 bytes'),
        (b'AA== 0\nAA== 1\n', 'line 2 gives a token that an earlier line has'),
        (b'AA== 0\nxyz\n', 'line 2 is not a token in base64 and its rank'),
        (b'AA== 0\n!!== 1\n', 'line 2 is not a token in base64 and its rank'),
        (None, r'is a tiktoken file of 256 ranks, which is no encoding known here\. Known are gpt2 \(50256\), p50k'),
    ],
)
def test_ranks_that_are_damaged_or_unknown_are_named(tmp_path, content, message):
    import base64

    whole = b''.join(base64.b64encode(bytes([byte])) + b' %d\n' % byte for byte in range(256))
    (tmp_path / 'a.tiktoken').write_bytes(whole if content is None else content)
    with pytest.raises(UserError, match=rf'a\.tiktoken: .*{message}'):
        load_vocabulary(tmp_path)


def foreign_model(**settings) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(['the tortoise and the hare', 'slow and steady wins the race', 'ﬁn de siècle'] * 20),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=3,
        **{'vocab_size': 330, **settings},
    )
    return model.getvalue()


LLAMA2 = {'normalization_rule_name': 'identity', 'remove_extra_whitespaces': False, 'byte_fallback': True}
OWN_TOKEN = {'add_dummy_prefix': False, 'user_defined_symbols': ['<tool>']}
STYLES = {
    'llama2': LLAMA2,
    'own_token': {**LLAMA2, **OWN_TOKEN},
    'nmt_nfkc': {'byte_fallback': True},
    'without_bytes': {},
}


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
@pytest.mark.parametrize('style', STYLES, ids=STYLES)
def test_models_of_sentencepiece_have_their_ids_and_texts_in_tokenizers(tmp_path, kind, style):
    content = foreign_model(model_type=kind, **STYLES[style])
    (tmp_path / 'tokenizer.model').write_bytes(content)
    vocabulary, original = load_vocabulary(tmp_path), sentencepiece.SentencePieceProcessor(model_proto=content)
    assert isinstance(vocabulary, SentencePieceVocabulary)
    write_vocabulary(vocabulary, tmp_path / 'written')
    assert (tmp_path / 'written' / 'tokenizer.model').read_bytes() == content
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / 'written' / 'tokenizer.json'))
    texts = [
        'the hare',
        ' the  hare ',
        'steady',
        'a<tool>the race',
        'ﬁn',
        'slow\tsteady\nraces',
        'Заяц 🐢 wins',
        '',
        'e' * 9,
    ]
    for text in texts:
        ids = original.encode(text)
        assert vocabulary.encode(text) == ids
        assert theirs.encode(text, add_special_tokens=False).ids == ids
        assert theirs.decode(ids, skip_special_tokens=False).replace('<unk>', ' ⁇ ') == original.decode(ids)
        marked_ids, spans = vocabulary.encode_marked(text)
        assert marked_ids == ids
        for token, (a, b) in zip(ids, spans, strict=True):
            if kind == 'bpe' and style == 'llama2' and not original.is_byte(token) and (piece := text[a:b]):
                assert original.id_to_piece(token).removeprefix('▁') == piece.replace(' ', '▁').removeprefix('▁')
        assert [b for _, b in spans][-1:] == [len(text)][: len(ids)] or style != 'llama2'


def test_a_directory_of_several_files_is_refused_where_they_do_not_say_all(tmp_path):
    (tmp_path / 'tokenizer.model').write_bytes(foreign_model())
    (tmp_path / 'added_tokens.json').write_text('{"<extra>": 100000}')
    with pytest.raises(UserError, match=r'tokenizer\.model: has \d+ tokens, but 1 more were added from id 100000 on'):
        load_vocabulary(tmp_path)
    vocabulary = train_vocabulary(config('byte_level_bpe', size=270), ['the cat sat on the mat '] * 20)
    for name, content in vocabulary.files().items():
        (tmp_path / {'encoder.json': 'vocab.json', 'vocab.bpe': 'merges.txt'}[name]).write_bytes(content)
    (tmp_path / 'tokenizer.model').unlink()
    (tmp_path / 'tokenizer_config.json').write_text('{"tokenizer_class": "CLIPTokenizer"}')
    with pytest.raises(UserError, match='has no tokenizer.json, and how a CLIPTokenizer splits text is not known'):
        load_vocabulary(tmp_path)
    given = {'tokenizer_class': 'GPT2Tokenizer', 'eos_token': '<eos>', 'bos_token': '<bos>', 'pad_token': '<pad>'}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(given))
    loaded = load_vocabulary(tmp_path)
    assert isinstance(loaded, ByteLevelBPE)
    assert loaded == vocabulary
    (tmp_path / 'tokenizer_config.json').write_text('{"eos_token": "</s>"}')
    with pytest.raises(UserError, match=r"vocab\.json: has no special token '</s>', which is named as its eos"):
        load_vocabulary(tmp_path)


def test_a_directory_that_cannot_be_written_is_an_error(vocabulary, tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='cannot write a tokenizer'):
        write_vocabulary(vocabulary, tmp_path / 'file')


def _t5(directory, texts):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=200,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=3,
    )
    (directory / 'spiece.model').write_bytes(model.getvalue())
    return {'eos': '</s>', 'unk': '<unk>', 'pad': '<pad>'}


def _roberta(directory, texts):
    names = {'bos': '<s>', 'pad': '<pad>', 'eos': '</s>', 'unk': '<unk>', 'mask': '<mask>'}
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=400, special_tokens=list(names.values()), show_progress=False)
    tokenizer.save_model(str(directory))
    return names | {'sep': '</s>', 'cls': '<s>'}


def _bert(directory, texts):
    del texts
    names = {role: f'[{role.upper()}]' for role in ('pad', 'unk', 'cls', 'sep', 'mask')}
    letters = 'abcdefghijklmnopqrstuvwxyz.,'
    words = [*names.values(), *letters, *(f'##{letter}' for letter in letters), 'small', 'model']
    (directory / 'vocab.txt').write_text('\n'.join(words))
    return names


@pytest.mark.oracle
@pytest.mark.parametrize(('kind', 'make'), [('T5', _t5), ('Roberta', _roberta), ('Bert', _bert)])
def test_files_of_encoders_have_the_ids_of_transformers_and_those_written_too(kind, make, tmp_path, documents):
    import transformers

    roles = make(tmp_path, documents[:20])
    content = {'tokenizer_class': f'{kind}Tokenizer', **{f'{role}_token': name for role, name in roles.items()}}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(content))
    vocabulary, oracle = load_vocabulary(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    write_vocabulary(vocabulary, tmp_path / 'out', ends=True)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
    assert vocabulary.size == len(oracle) == len(again)
    before = [] if vocabulary.bos_id is None else [vocabulary.bos_id]
    for text in ['A small model, and another.', 'Äsop  is old', *documents[20:23]]:
        ids = oracle(text)['input_ids']
        assert ids == [*before, *vocabulary.encode(text), vocabulary.eos_id] == again(text)['input_ids']
    names = ['<extra_id_0>', '<extra_id_99>'] if kind == 'T5' else [roles['mask']]
    for name in names:
        wanted = oracle.convert_tokens_to_ids(name)
        assert vocabulary.special_ids[name] == wanted == again.convert_tokens_to_ids(name)
    assert again.mask_token == roles.get('mask')
