"""Masked language modelling: how much is masked, what it becomes, and what is masked together."""

import numpy as np
import pytest

from llm.data.objectives import record_generator
from llm.data.objectives.masking import MaskedLanguageModelling, word_edges
from llm.data.vocabularies import ByteVocabulary
from llm.errors import UserError

VOCABULARY = ByteVocabulary()
TEXT = 'the quick brown fox jumps over the lazy dog and runs away from it ' * 3


def row(*texts, width=256):
    targets, segments = np.full(width, VOCABULARY.pad_id, np.int32), np.zeros(width, np.int32)
    start = 0
    for number, text in enumerate(texts, start=1):
        tokens = [*VOCABULARY.encode(text), VOCABULARY.eos_id]
        targets[start : start + len(tokens)] = tokens
        segments[start : start + len(tokens)] = number
        start += len(tokens)
    return {'targets': targets, 'segment_ids': segments, 'positions': np.arange(width, dtype=np.int32)}


def masked(objective, example, index=0):
    """With targets and weights of the chosen at their places in the row, which is its text elsewhere."""
    batch = objective.bind(VOCABULARY, len(example['targets']))(example, record_generator(0, 0, index))
    weights = np.zeros(len(example['targets']), np.float32)
    chosen = batch['predicted'][batch['loss_weights'] > 0]
    weights[chosen] = 1
    assert len(set(chosen.tolist())) == len(chosen) and sorted(chosen) == chosen.tolist()
    np.testing.assert_array_equal(batch['targets'], example['targets'][batch['predicted']])
    return batch | {'targets': example['targets'], 'loss_weights': weights}


@pytest.mark.parametrize('rate', [0.15, 0.4])
def test_so_many_tokens_of_every_document_are_chosen_and_boundaries_never(rate):
    example = row(TEXT, 'ab', 'x')
    for index in range(20):
        batch = masked(MaskedLanguageModelling(rate), example, index)
        for number, size in ((1, len(TEXT)), (2, 2), (3, 1)):
            inside = example['segment_ids'] == number
            assert batch['loss_weights'][inside].sum() == max(1, round(rate * size))
        ends = np.isin(example['targets'], [VOCABULARY.eos_id, VOCABULARY.pad_id])
        assert not batch['loss_weights'][ends].any()
        np.testing.assert_array_equal(batch['targets'], example['targets'])
        same = batch['loss_weights'] == 0
        np.testing.assert_array_equal(batch['inputs'][same], example['targets'][same])


@pytest.mark.parametrize('unit', ['token', 'word', 'span'])
def test_eighty_percent_become_the_mask_and_ten_a_random_token(unit):
    example, mask = row(TEXT), VOCABULARY.size
    counts = np.zeros(3)
    specials = set(VOCABULARY.special_ids.values())
    for index in range(400):
        batch = masked(MaskedLanguageModelling(unit=unit), example, index)
        chosen = batch['loss_weights'] > 0
        inputs, targets = batch['inputs'][chosen], batch['targets'][chosen]
        counts += [(inputs == mask).sum(), (inputs == targets).sum(), ((inputs != mask) & (inputs != targets)).sum()]
        assert not specials & set(inputs.tolist())
    # One of 256 random tokens is the old one.
    np.testing.assert_allclose(counts / counts.sum(), [0.8, 0.1 + 0.1 / 256, 0.1 - 0.1 / 256], atol=0.03)


@pytest.mark.parametrize('unit', ['token', 'word'])
def test_what_a_row_of_many_documents_has_no_room_for_is_left_out_at_random(unit):
    objective = MaskedLanguageModelling(unit=unit, mask_share=1.0, random_share=0.0)
    example = row(*['x'] * 100)  # each document would have one
    most = objective.most(256)
    chosen = [masked(objective, example, index)['loss_weights'] for index in range(40)]
    assert most == 48 and all(weights.sum() == most for weights in chosen)
    # Every document about as often as any other: 19.2 of 40, with standard deviation 3.2.
    often = np.sum(chosen, axis=0)[:200:2]
    assert often.sum() == 40 * most and often.min() > 6 and often.max() < 33
    # A lone word longer than the row has room for is cut.
    long = masked(MaskedLanguageModelling(unit='word'), row('x' * 200))
    assert long['loss_weights'].sum() == most


def words_of(text):
    """Index of the word of each character; a space is one by itself, as white space is that is a token alone."""
    space = np.array([character == ' ' for character in text])
    return np.cumsum(np.concatenate([[False], space[1:] | space[:-1]]))


def test_whole_words_are_masked_together():
    example, words = row(TEXT), words_of(TEXT)
    for index in range(30):
        batch = masked(MaskedLanguageModelling(unit='word'), example, index)
        chosen = batch['loss_weights'][: len(TEXT)] > 0
        for word in np.unique(words[chosen]):
            assert chosen[words == word].all()
        assert 1 <= chosen.sum() <= round(0.15 * len(TEXT))


def test_spans_are_whole_words_with_geometric_lengths_and_one_fate():
    text = ' '.join('abcdefghijklmnopqrstuvwxyz' * 4)  # every token is a word
    example = row(text, width=512)
    objective = MaskedLanguageModelling(rate=0.15, unit='span', max_span=4)
    lengths, fates = [], []
    for index in range(300):
        batch = masked(objective, example, index)
        chosen = np.concatenate([[0], batch['loss_weights'][: len(text)] > 0, [0]]).astype(int)
        starts, stops = np.flatnonzero(np.diff(chosen) == 1), np.flatnonzero(np.diff(chosen) == -1)
        assert abs(chosen.sum() - round(0.15 * len(text))) <= 1
        for start, stop in zip(starts, stops, strict=True):
            lengths.append(stop - start)
            inputs = batch['inputs'][start:stop]
            fates.append(len({'mask' if x == VOCABULARY.size else 'other' for x in inputs}))
    # min(geometric(0.2), 4) has shares 0.2, 0.16, 0.128 and the rest; the last span of a row is cut to the budget, and
    # neighbours run together.
    shares = np.bincount(lengths, minlength=12)[1:] / len(lengths)
    assert shares[3] > max(shares[:3]) and shares[0] > 0.15
    assert np.mean(np.array(fates) == 1) > 0.8


def test_words_begin_at_white_space():
    opens, closes = word_edges(VOCABULARY)
    space, letter = VOCABULARY.encode(' ')[0], VOCABULARY.encode('a')[0]
    assert opens[space] and closes[space] and not opens[letter] and not closes[letter]


def test_a_mask_token_of_the_vocabulary():
    name = next(iter(VOCABULARY.special_ids))
    objective = MaskedLanguageModelling(mask_token=name, mask_share=1.0, random_share=0.0)
    batch = masked(objective, row(TEXT))
    assert set(batch['inputs'][batch['loss_weights'] > 0]) == {VOCABULARY.special_ids[name]}
    assert objective.extra_ids(VOCABULARY) == 0 and MaskedLanguageModelling().extra_ids(VOCABULARY) == 1
    with pytest.raises(UserError, match="no special token 'nothing'"):
        MaskedLanguageModelling(mask_token='nothing').bind(VOCABULARY, 8)


@pytest.mark.parametrize(
    'changes', [{'rate': 0.0}, {'unit': 'page'}, {'mask_share': 0.95}, {'max_span': 0}, {'span_probability': 1.0}]
)
def test_what_cannot_be_is_refused(changes):
    with pytest.raises(UserError):
        MaskedLanguageModelling(**changes)
