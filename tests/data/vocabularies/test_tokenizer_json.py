"""Vocabularies of tokenizer.json files against `tokenizers` and transformers."""

import gzip
import json

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from llm.data.vocabularies import TokenizerJson, load_vocabulary
from llm.errors import UserError
from llm.inference.streaming import TextStream

SPECIAL = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '<s>', '</s>']
CORPUS = [
    'The hare ran; the tortoise walked on.',
    'Заяц и черепаха',
    'élan naïf — 12.5 % 🐢',
    '    def f(x):\n\treturn x',
] * 20
TEXTS = [*CORPUS[:4], '', ' ', '  two  spaces ', 'unheard-of ⟨glyphs⟩ 🦙🦙', '</s> is [SEP] no token', 'ﬁ Ǆ ́']


def bytes_bpe(*added: str) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    tokenizer.add_tokens(['    ', '⟨glyphs⟩', *added])
    return tokenizer


def fallback_bpe() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token='[UNK]', fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    spaces = [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)]
    tokenizer.decoder = decoders.Sequence(spaces)
    names = [*SPECIAL, *(f'<0x{byte:02X}>' for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=names, limit_alphabet=30)
    tokenizer.train_from_iterator(CORPUS, trainer)
    described = json.loads(tokenizer.to_str())
    described['added_tokens'] = described['added_tokens'][: len(SPECIAL)]
    described['truncation'] = {'direction': 'Right', 'max_length': 3, 'strategy': 'LongestFirst', 'stride': 0}
    return tokenizers.Tokenizer.from_str(json.dumps(described))


def wordpiece() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token='[UNK]'))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL))
    tokenizer.post_processor = processors.BertProcessing(('[SEP]', 3), ('[CLS]', 2))
    return tokenizer


def unigram() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token='[UNK]')
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_level() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token='[UNK]'))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(CORPUS, trainers.WordLevelTrainer(vocab_size=60, special_tokens=SPECIAL))
    return tokenizer


MAKERS = [bytes_bpe, fallback_bpe, wordpiece, unigram, word_level]
ROLES = {'pad': '[PAD]', 'bos': '<s>', 'eos': '</s>'}


@pytest.fixture(scope='module', params=MAKERS, ids=lambda make: make.__name__)
def theirs(request) -> tokenizers.Tokenizer:
    tokenizer = request.param()
    tokenizer.no_padding()
    return tokenizer


@pytest.fixture(scope='module')
def ours(theirs) -> TokenizerJson:
    return TokenizerJson(theirs.to_str().encode(), ROLES)


def test_ids_and_text_are_those_of_tokenizers(theirs, ours):
    theirs.no_truncation()
    theirs.encode_special_tokens = True
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False).ids
        special = {i for i, token in theirs.get_added_tokens_decoder().items() if token.special} - {ours.unk_id}
        assert not special & set(ours.encode(text))
        if not special & set(ids):
            assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids)
        theirs.encode_special_tokens = False
        marked = theirs.encode(text, add_special_tokens=False)
        assert ours.encode_marked(text) == (marked.ids, ours.encode_marked(text)[1])
        theirs.encode_special_tokens = True
    assert ours.size == theirs.get_vocab_size()
    assert ours.special_ids == {name: i for i, name in enumerate(SPECIAL)}
    assert (ours.pad_id, ours.bos_id, ours.eos_id) == (0, 5, 6)
    assert ours.unk_id == (None if ours.lossless else 1)


def test_a_stream_gives_the_decoded_text_in_whole_characters(ours):
    text = 'The tortoise — élan 🐢 и Заяц'
    ids = ours.encode(text)
    stream = TextStream(ours.token_bytes())
    pieces = [stream.push([token]) for token in ids] + [stream.close()]
    assert not any('\ufffd' in piece for piece in pieces)
    # Decoders may leave out the first space; WordPiece's own puts words together around punctuation.
    expected = ours.decode(ids)
    assert ''.join(''.join(pieces).split()) == ''.join(expected.split())
    assert ours.lossless == (expected == text and '    ' in ours._tokenizer.get_vocab())


def test_a_saved_one_is_the_same(ours, tmp_path):
    ours.save(tmp_path / 'vocabulary')
    loaded = load_vocabulary(tmp_path)
    assert loaded == ours
    assert loaded.files() == ours.files()
    assert [loaded.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]


BYTES_BPE = TokenizerJson(bytes_bpe('naïf').to_str().encode(), ROLES)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=300)
@given(
    text=st.lists(st.one_of(st.text(), st.sampled_from(['<s>', '[MASK]', '    ', 'naïf', 'naï', '\r\n']))).map(''.join)
)
def test_a_byte_level_one_gives_back_any_text(text):
    ids = BYTES_BPE.encode(text)
    assert BYTES_BPE.lossless
    assert BYTES_BPE.decode(ids) == text
    assert BYTES_BPE.decode_bytes(ids) == text.encode()
    assert not set(ids) & set(BYTES_BPE.special_ids.values())


def test_an_added_token_of_latin_letters_is_spelt_as_it_is():
    """The decoder of `tokenizers` takes 'ï' in it for the byte that 'ï' stands for elsewhere, and loses it."""
    ids = BYTES_BPE.encode('naïf')
    assert len(ids) == 1
    assert BYTES_BPE.decode(ids) == 'naïf'
    assert BYTES_BPE._tokenizer.decode(ids) == 'na\ufffdf'


def test_one_of_gpt_neox_agrees_on_long_real_texts_with_its_runs_of_spaces(dev_data, tmp_path):
    packed = dev_data / 'tokenizers' / 'neox_20B_tokenizer.json.gz'
    (tmp_path / 'tokenizer.json').write_bytes(gzip.decompress(packed.read_bytes()))
    ours = load_vocabulary(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
    assert (ours.size, ours.eos_id, ours.bos_id, ours.lossless) == (50277, 0, 0, False)  # it normalises: NFC
    for name in ('tinyshakespeare', 'tinystories'):
        text = gzip.decompress((dev_data / 'text' / f'{name}.txt.gz').read_bytes()).decode()[:400_000]
        ids = ours.encode(text)
        assert ids == theirs.encode(text).ids
        assert ours.decode(ids) == theirs.decode(ids)
    code = 'def f():\n        return  1'
    assert ours.decode(ours.encode(code)) == code
    assert len(ours.encode(code)) < 10


def test_files_beside_it_say_which_tokens_have_a_role(tmp_path):
    (tmp_path / 'tokenizer.json').write_text(bytes_bpe('naïf').to_str())
    roles = lambda: {role: name for role, name in load_vocabulary(tmp_path).roles.items() if name}  # noqa: E731
    assert roles() == {'bos': '<s>', 'eos': '</s>'}  # by their names alone
    (tmp_path / 'config.json').write_text('{"bos_token_id": 2, "eos_token_id": [3, 4], "pad_token_id": null}')
    assert roles() == {'bos': '[CLS]', 'eos': '[SEP]'}
    (tmp_path / 'generation_config.json').write_text('{"eos_token_id": 4}')
    assert roles() == {'bos': '[CLS]', 'eos': '[MASK]'}
    (tmp_path / 'special_tokens_map.json').write_text('{"pad_token": {"content": "[PAD]"}, "eos_token": "naïf"}')
    assert roles() == {'bos': '[CLS]', 'eos': 'naïf', 'pad': '[PAD]'}
    (tmp_path / 'tokenizer_config.json').write_text('{"bos_token": null, "eos_token": "</s>"}')
    assert roles() == {'eos': '</s>', 'pad': '[PAD]'}
    (tmp_path / 'tokenizer_config.json').write_text('{"eos_token": "<none>"}')
    with pytest.raises(UserError, match=r"tokenizer\.json: has no token '<none>', which is named as its eos"):
        load_vocabulary(tmp_path)
    (tmp_path / 'tokenizer_config.json').write_text('{"eos_token": 5}')
    with pytest.raises(UserError, match=r'tokenizer_config\.json: gives a eos_token that is no string'):
        load_vocabulary(tmp_path)


GOOD = json.loads(word_level().to_str())


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('{', 'is not JSON'),
        ('[' * 100_000, 'is not JSON'),
        ('{}', "it has no object 'model'"),
        (json.dumps({**GOOD, 'model': {'type': 'Quipu', 'vocab': {}}}), r'cannot be used as a tokenizer\.json'),
        (json.dumps({**GOOD, 'normalizer': {'type': 'Precompiled', 'precompiled_charsmap': 'AAAA'}}), 'cannot be used'),
        (json.dumps({**GOOD, 'added_tokens': [{'id': 1}]}), "its 'added_tokens' are not tokens"),
        (json.dumps({**GOOD, 'added_tokens': 'x'}), "its 'added_tokens' are not tokens"),
        (json.dumps({**GOOD, 'pre_tokenizer': {'type': 'Split', 'pattern': {'Regex': '('}}}), 'cannot be used'),
        (
            json.dumps({**GOOD, 'model': {**GOOD['model'], 'vocab': {'a': 0, 'b': 1 << 30}}}),
            'gives ids up to 1073741824',
        ),
        (json.dumps({'version': '1.0', 'model': {'type': 'BPE', 'vocab': {}, 'merges': []}}), 'has no tokens'),
    ],
)
def test_what_is_damaged_is_named(tmp_path, content, message):
    (tmp_path / 'tokenizer.json').write_text(content)
    for path in (tmp_path, tmp_path / 'tokenizer.json'):
        with pytest.raises(UserError, match=rf'tokenizer\.json: .*{message}'):
            load_vocabulary(path)


def test_vocab_txt_of_bert_is_the_tokenizer_that_transformers_makes_of_it(tmp_path):
    import transformers

    names = sorted(wordpiece().get_vocab().items(), key=lambda item: item[1])
    (tmp_path / 'vocab.txt').write_text(''.join(f'{name}\n' for name, _ in names))
    (tmp_path / 'tokenizer_config.json').write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    ours, theirs = load_vocabulary(tmp_path), transformers.BertTokenizerFast(str(tmp_path / 'vocab.txt'))
    assert (ours.bos_id, ours.eos_id) == (theirs.cls_token_id, theirs.sep_token_id)
    for text in TEXTS[:-2]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    (tmp_path / 'vocab.txt').write_text('a\nb\n')
    with pytest.raises(UserError, match=r'vocab\.txt: has no \[UNK\]'):
        load_vocabulary(tmp_path)
