"""Span corruption against the definition of T5's, and mixtures of denoisers."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data.objectives import record_generator
from llm.data.objectives.denoising import UL2_DENOISERS, Denoiser, SpanCorruption, corrupt
from llm.errors import UserError
from tests.data.byte_tokens import ByteTokens

VOCABULARY = ByteTokens()
FIRST, END = VOCABULARY.size, 1


def row(*lengths, width=None, seed=0):
    """A row of documents of these lengths, each of bytes and an end, as PackedRows gives it."""
    rng = np.random.default_rng(seed)
    size = sum(lengths) if width is None else width
    targets, segments = np.zeros(size, np.int32), np.zeros(size, np.int32)
    start = 0
    for number, length in enumerate(lengths, start=1):
        targets[start : start + length] = [*rng.integers(3, VOCABULARY.size, length - 1), END]
        segments[start : start + length] = number
        start += length
    return {'targets': targets, 'segment_ids': segments}


def sides(batch, number):
    """What the encoder and the decoder have of a document."""
    return (
        batch['encoder_inputs'][batch['encoder_segment_ids'] == number].tolist(),
        batch['targets'][batch['segment_ids'] == number].tolist(),
    )


def restored(encoder, decoder, sentinels):
    """The text, from both sides without their ends."""
    spans, current = {}, None
    for token in decoder:
        if token in sentinels:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    return list(itertools.chain.from_iterable(spans.pop(token, [token]) for token in encoder))


def test_the_example_of_the_paper():
    text = np.array(['Thank', 'you', 'for', 'inviting', 'me', 'to', 'your', 'party', 'last', 'week'])
    noise = np.isin(np.arange(10), [2, 3, 8])
    encoder, decoder = corrupt(text.astype(object), noise, np.array(['<X>', '<Y>', '<Z>'], object))
    assert ' '.join(encoder) == 'Thank you <X> me to your party <Y> week'
    assert ' '.join(decoder) == '<X> for inviting <Y> last'


@settings(max_examples=150, derandomize=True)
@given(
    length=st.integers(1, 600),
    density=st.floats(0.05, 0.6),
    mean=st.floats(1, 20) | st.none(),
    seed=st.integers(0, 2**31),
)
def test_noise_has_the_density_and_the_number_of_spans_of_t5(length, density, mean, seed):
    noise = Denoiser(density, mean).noise(length, np.random.default_rng(seed))
    assert noise.shape == (length,) and not noise[0]
    if length < 2:
        return
    # T5's `random_spans_noise_mask`: round half to even, at least one token of noise and one of text.
    tokens = min(max(round(np.float32(length * density)), 1), length - 1)
    assert abs(int(noise.sum()) - tokens) <= (1 if abs(length * density % 1 - 0.5) < 1e-4 else 0)
    spans = np.count_nonzero(np.diff(noise.astype(int)) == 1)
    wanted = 1 if mean is None else max(round(tokens / mean), 1)
    # More spans than there are tokens to go between them, T5 cannot make either.
    assert spans == min(wanted, length - tokens, tokens) or abs(tokens / (mean or 1) % 1 - 0.5) < 1e-2
    if mean is None:
        assert noise[-1] and spans == 1


def test_all_ways_to_place_the_spans_are_equally_likely():
    """T5 draws how noise is cut into spans, and text into as many, each evenly: here 5 in 2 and 7 in 2."""
    denoiser, generator = Denoiser(5 / 12, 2.5), np.random.default_rng(0)
    assert [int(x[0]) for x in denoiser.counts(np.array([12]))] == [5, 2]
    draws = 12_000
    found = collections.Counter(denoiser.noise(12, generator).tobytes() for _ in range(draws))
    expected = {
        np.repeat([False, True, False, True], [text, cut, 7 - text, 5 - cut]).tobytes()
        for text in range(1, 7)
        for cut in range(1, 5)
    }
    assert set(found) == expected
    mean = draws / len(expected)
    chi_square = sum((count - mean) ** 2 / mean for count in found.values())
    assert chi_square < 50  # 23 degrees of freedom: exceeded once in a thousand


@pytest.mark.parametrize('objective', [SpanCorruption(), SpanCorruption(UL2_DENOISERS)], ids=['t5', 'ul2'])
def test_both_sides_together_are_the_text(objective):
    function = objective.bind(VOCABULARY, 128)
    sentinels = function.sentinels.tolist()
    assert sentinels == list(range(FIRST + 99, FIRST - 1, -1))  # counted down, as T5's
    lengths = (40, 2, 1, 30, 7)
    given_row = row(*lengths, width=90)
    batch = function(given_row, record_generator(3, 0, 5))
    for number in range(1, 6):
        encoder, decoder = sides(batch, number)
        assert encoder.pop() == END and decoder.pop() == END
        if objective.modes:
            assert FIRST + 100 <= encoder.pop(0) < FIRST + 103
        text = given_row['targets'][given_row['segment_ids'] == number].tolist()
        assert restored(encoder, decoder, sentinels) == text[:-1]
        marks = [token for token in decoder if token in sentinels]
        assert marks == sentinels[: len(marks)] == [token for token in encoder if token in sentinels]
    # What the decoder reads is what it writes, one later, and padding first.
    real = batch['segment_ids'] > 0
    np.testing.assert_array_equal(batch['loss_weights'], real)
    first = real & (batch['positions'] == 0)
    assert set(batch['inputs'][first]) == {0}
    later = np.flatnonzero(real & ~first)
    np.testing.assert_array_equal(batch['inputs'][later], batch['targets'][later - 1])


def test_lengths_are_those_of_t5():
    objective = SpanCorruption()
    assert objective.window(512) == 568 and objective.decoder_length(512) == 114
    function = objective.bind(VOCABULARY, 512)
    text = row(568)
    text['targets'][-1] = 7  # a piece of a longer document
    batch = function(text, record_generator(0, 0, 0))
    assert np.count_nonzero(batch['encoder_segment_ids']) == 512
    assert np.count_nonzero(batch['segment_ids']) == 114


@settings(max_examples=60, derandomize=True)
@given(data=st.data(), ul2=st.booleans(), size=st.sampled_from([24, 64, 128]))
def test_what_is_planned_fits_whatever_is_drawn(data, ul2, size):
    objective = SpanCorruption(UL2_DENOISERS) if ul2 else SpanCorruption()
    longest = objective.window(size)
    room = objective.room(np.arange(1, longest + 1), size)
    lengths, left = [], size
    while True:
        fitting = int(np.searchsorted(room, left, side='right'))
        if not fitting or len(lengths) > 12:
            break
        lengths.append(data.draw(st.integers(1, fitting)))
        left -= int(room[lengths[-1] - 1])
    batch = objective.bind(VOCABULARY, size)(row(*lengths), record_generator(data.draw(st.integers(0, 99)), 0, 0))
    assert set(batch['encoder_segment_ids']) | {0} == set(range(len(lengths) + 1))
    assert set(batch['segment_ids']) | {0} == set(range(len(lengths) + 1))


def test_denoisers_are_drawn_at_their_rates():
    objective = SpanCorruption((Denoiser(0.15, 3.0, 0, 3.0), Denoiser(0.25, None, 1)))
    function = objective.bind(VOCABULARY, 64)
    batches = [function(row(40), record_generator(0, 0, i)) for i in range(2000)]
    modes = np.array([batch['encoder_inputs'][0] - FIRST - 100 for batch in batches])
    assert abs((modes == 0).mean() - 0.75) < 0.04  # four standard deviations
    for batch in itertools.compress(batches[:50], modes[:50] == 1):
        encoder, decoder = sides(batch, 1)
        assert len(encoder) == 1 + 29 + 1 + 1 and encoder[-2] == FIRST + 99  # a quarter of 39, at the end
        assert len(decoder) == 1 + 10 + 1


def test_ul2_is_that_of_its_paper():
    assert [(each.density, each.mean_span) for each in UL2_DENOISERS] == [
        *((0.15, 3.0), (0.15, 8.0), (0.25, None)),
        *((0.5, 3.0), (0.5, 8.0), (0.15, 64.0), (0.5, 64.0)),
    ]
    assert [each.mode for each in UL2_DENOISERS] == [0, 0, 1, 2, 2, 2, 2]


def test_sentinels_of_the_vocabulary_are_used_where_it_has_them():
    @dataclasses.dataclass(frozen=True)
    class WithSentinels(ByteTokens):
        @property
        def special_ids(self):
            return {f'<extra_id_{i}>': 258 - i for i in range(20)}

    objective = SpanCorruption(num_sentinels=20)
    assert objective.extra_ids(WithSentinels()) == 0 and objective.extra_ids(VOCABULARY) == 20
    assert objective.bind(WithSentinels(), 64).sentinels.tolist() == list(range(258, 238, -1))


@pytest.mark.parametrize(
    ('make', 'what'),
    [
        (lambda: Denoiser(0.0), 'out of range'),
        (lambda: Denoiser(mean_span=0.5), 'out of range'),
        (lambda: Denoiser(mode=-1), 'mode is -1'),
        (lambda: SpanCorruption(()), 'denoisers is empty'),
        (lambda: SpanCorruption(target_length=1), 'target_length is 1'),
        (lambda: SpanCorruption(target_length=4).window(1), 'hold no text'),
        (lambda: SpanCorruption(num_sentinels=5).window(512), 'there are 5 sentinels'),
    ],
)
def test_what_cannot_be_is_refused(make, what):
    with pytest.raises(UserError, match=what):
        make()
