"""Pairs of texts: what stands in a row, how often they are no pair, and where the other text is from."""

import json

import numpy as np
import pytest

from llm.data.datasets import Component, DataConfig
from llm.data.objectives import record_generator
from llm.data.objectives.masking import MaskedLanguageModelling
from llm.data.objectives.sentence_pairs import SentencePairs
from llm.data.sources import TextFiles
from llm.data.vocabularies import ByteVocabulary
from llm.errors import UserError

VOCABULARY = ByteVocabulary()
LENGTH, DOCUMENTS = 48, 40
START, END = VOCABULARY.bos_id if VOCABULARY.bos_id is not None else VOCABULARY.eos_id, VOCABULARY.eos_id
# Nothing is replaced, so that texts can be read off the inputs.
SHOWN = MaskedLanguageModelling(mask_share=0.0, random_share=0.0)


def texts():
    """Documents that say on every token which one it is of."""
    return [chr(ord('0') + i) * (10 + i % 25) for i in range(DOCUMENTS)]


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp('corpus')
    (folder / 'a.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in texts()))
    source = TextFiles(str(folder / '*.jsonl'), validation_fraction=0.2)
    return (Component('text', source),), str(folder / 'cache')


def opened(corpus, kind):
    components, cache = corpus
    data = DataConfig(components, cache_directory=cache, workers=1, objective=SentencePairs(kind, SHOWN))
    return data.open_training(VOCABULARY, LENGTH, progress=False)


def sides(row):
    """(A, B, label) of a row, whose frame is checked."""
    real = int(np.count_nonzero(row['segment_ids']))
    tokens, types = row['inputs'][:real].tolist(), row['token_types'][:real]
    border = int(np.argmax(types)) if types.any() else real
    assert tokens[0] == START and tokens[border - 1] == tokens[-1] == END
    assert types[:border].sum() == 0 and types[border:].all() and not row['token_types'][real:].any()
    np.testing.assert_array_equal(row['positions'][:real], np.arange(real))
    (label,) = set(row['next_sentence'].tolist())
    return tokens[1 : border - 1], tokens[border:-1], label


def test_the_next_text_or_another_document_of_the_same_length(corpus):
    examples = opened(corpus, 'next')
    rows = examples.sources[0].records.num_rows
    lengths = {VOCABULARY.encode(text[0])[0]: len(text) for text in texts()}
    batch = examples.rows(np.arange(20 * rows))
    labels, shorter = [], 0
    for i in range(20 * rows):
        first, second, label = sides({name: x[i] for name, x in batch.items()})
        labels.append(label)
        (a,), (b,) = set(first), set(second)
        assert (a == b) == (label == 0)
        whole = lengths[a]
        assert len(first) + len(second) == whole or (label and len(second) == lengths[b] < whole - len(first))
        shorter += len(first) + len(second) < whole
    assert len(labels) > 400 and abs(np.mean(labels) - 0.5) < 0.08 and shorter < 0.3 * len(labels)
    # By record and epoch, not by what was read before.
    again = opened(corpus, 'next')[7 * rows + 3]
    assert all(np.array_equal(again[name], batch[name][7 * rows + 3]) for name in again)
    # Boundaries are never to be found.
    chosen = batch['targets'][batch['loss_weights'] > 0]
    assert len(chosen) and not np.isin(chosen, [START, END]).any()


def test_order_swaps_the_two_halves():
    objective = SentencePairs('order', SHOWN).bind(VOCABULARY, LENGTH)
    text = np.array([*VOCABULARY.encode('abcdefghijkl'), END], np.int32)
    example = {'targets': text, 'segment_ids': np.ones(13, np.int32)}
    labels, cuts = [], set()
    for index in range(200):
        first, second, label = sides(objective(example, record_generator(0, 0, index)))
        joined = second + first if label else first + second
        assert joined == text[:-1].tolist() and first and second
        labels.append(label)
        cuts.add(len(second if label else first))
    assert abs(np.mean(labels) - 0.5) < 0.12 and cuts == set(range(1, 12))


@pytest.mark.parametrize('kind', ['next', 'order'])
def test_what_is_too_short_is_no_pair(kind):
    objective = SentencePairs(kind).bind(VOCABULARY, LENGTH)
    empty = {'other_targets': np.zeros(4, np.int32), 'other_segment_ids': np.zeros(4, np.int32)}
    for text in ([], [100, END]):
        example = {'targets': np.array(text, np.int32), 'segment_ids': np.ones(len(text), np.int32)}
        row = objective(example | empty, record_generator(0, 0, 0))
        assert set(row['next_sentence'].tolist()) == {-1} and row['loss_weights'].sum() == bool(text)


def test_what_cannot_be_is_named():
    with pytest.raises(UserError, match="kind is 'before'"):
        SentencePairs('before')
    with pytest.raises(UserError, match=r"no special token '\[CLS\]'"):
        SentencePairs(first_token='[CLS]').bind(VOCABULARY, LENGTH)
    with pytest.raises(UserError, match='no room for a pair'):
        SentencePairs().window(4)
