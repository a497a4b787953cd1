"""SentencePiece vocabularies: those trained here, and models from elsewhere."""

import io

import pytest
import sentencepiece

from llm.data.vocabularies import SentencePieceVocabulary, load_vocabulary, train_vocabulary
from llm.errors import UserError
from tests.data.vocabularies.small_vocabularies import config


def model_of(**settings) -> bytes:
    """A model as others train them: unless told otherwise, NFKC, a space before the text, no byte fallback."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(['the tortoise and the hare', 'slow and steady wins the race'] * 20),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=3,
        **settings,
    )
    return model.getvalue()


@pytest.mark.parametrize('kind', ['sentencepiece_bpe', 'sentencepiece_unigram'])
def test_training_twice_gives_the_same_model(documents, trained, kind):
    assert train_vocabulary(config(kind), reversed(documents)) == trained[kind]


def test_what_is_trained_here_is_lossless_and_learns_runs_of_spaces(trained):
    for kind in ('sentencepiece_bpe', 'sentencepiece_unigram'):
        assert trained[kind].lossless
        assert b'    ' in trained[kind].token_bytes()
        assert trained[kind].size == 600


def test_a_foreign_model_gives_its_own_ids_and_text(tmp_path):
    path = tmp_path / 'foreign.model'
    path.write_bytes(model_of(vocab_size=40))
    vocabulary = load_vocabulary(path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert not vocabulary.lossless
    for text in ('the hare', ' steady  wins ', 'ﬁ', 'Ж', 'the ' * 200_000):
        ids = vocabulary.encode(text)
        assert ids == theirs.encode(text)
        assert vocabulary.decode(ids) == theirs.decode(ids)
    assert (vocabulary.unk_id, vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id) == (0, 1, 2, 2)
    assert vocabulary.special_ids == {'<unk>': 0, '<s>': 1, '</s>': 2}
    vocabulary.save(tmp_path / 'saved')
    assert load_vocabulary(tmp_path / 'saved') == vocabulary


@pytest.mark.parametrize(
    'changed',
    [
        {'normalization_rule_name': 'nmt_nfkc'},
        {'add_dummy_prefix': True},
        {'remove_extra_whitespaces': True},
        {'byte_fallback': False},
    ],
)
def test_lossless_needs_every_setting(changed):
    lossless = {
        'normalization_rule_name': 'identity',
        'add_dummy_prefix': False,
        'remove_extra_whitespaces': False,
        'byte_fallback': True,
        'vocab_size': 300,
    }
    assert SentencePieceVocabulary(model_of(**lossless)).lossless
    assert not SentencePieceVocabulary(model_of(**{**lossless, **changed})).lossless


def test_a_true_lower_one_eighth_block_is_not_a_space(trained):
    for kind in ('sentencepiece_bpe', 'sentencepiece_unigram'):
        vocabulary = trained[kind]
        (space, *block) = vocabulary.encode(' ▁')
        table = vocabulary.token_bytes()
        assert table[space] == b' '
        assert b''.join(table[token] for token in block) == '▁'.encode()


@pytest.mark.parametrize('content', [b'', b'rubbish', b'\x0a\x05'])
def test_what_is_no_model_is_an_error(tmp_path, content):
    path = tmp_path / 'a.model'
    path.write_bytes(content)
    with pytest.raises(UserError, match=r'a\.model: is (not )?a SentencePiece model'):
        load_vocabulary(path)


def test_a_size_that_the_texts_cannot_give_is_an_error():
    for kind in ('sentencepiece_bpe', 'sentencepiece_unigram'):
        with pytest.raises(UserError, match='SentencePiece cannot learn 6000 pieces'):
            train_vocabulary(config(kind, size=6000), ['too little text'])
        with pytest.raises(UserError, match='SentencePiece cannot learn 100 pieces'):
            train_vocabulary(config(kind, size=100), ['too small a size'])
