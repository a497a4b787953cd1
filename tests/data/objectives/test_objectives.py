"""What holds for every objective: noise by (seed, epoch, record), batches reached directly, mixtures, SeqIO."""

import dataclasses
import json

import numpy as np
import pytest

from llm.data.datasets import Component, DataConfig
from llm.data.loader import Loader, local_batch
from llm.data.objectives import record_generator, spans_of
from llm.data.objectives.denoising import UL2_DENOISERS, Denoiser, SpanCorruption
from llm.data.objectives.masking import MaskedLanguageModelling
from llm.data.objectives.prefix import PrefixLanguageModelling
from llm.data.sources import TextFiles
from llm.data.vocabularies import ByteVocabulary
from llm.errors import UserError
from tests.data.packed_corpus import batch_sharding

VOCABULARY = ByteVocabulary()
OBJECTIVES = {
    'masked': MaskedLanguageModelling(),
    'words': MaskedLanguageModelling(unit='word'),
    'prefix': PrefixLanguageModelling(),
    'spans': SpanCorruption(),
    'ul2': SpanCorruption(UL2_DENOISERS),
}


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp('corpus')
    texts = [f'document {i} ' + 'some words ' * (i * 7 % 19) for i in range(120)]
    (folder / 'a.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in texts))
    source = TextFiles(str(folder / '*.jsonl'), validation_fraction=0.2)
    return DataConfig((Component('text', source),), cache_directory=str(folder / 'cache'), workers=1)


def opened(corpus, objective, length=64, **changes):
    config = dataclasses.replace(corpus, objective=objective, **changes)
    config.kind()
    return config.open_training(VOCABULARY, length, progress=False)


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize('name', OBJECTIVES)
def test_noise_differs_between_epochs_and_is_the_same_reached_directly(corpus, name):
    examples = opened(corpus, OBJECTIVES[name])
    source = examples.sources[0]
    rows = source.records.num_rows
    by_record = [{}, {}]
    for epoch in (0, 1):
        for index in range(rows):
            record = int(source._shuffle.locate([epoch * rows + index])[1][0])
            by_record[epoch][record] = examples[epoch * rows + index]
    differ = sum(not equal(by_record[0][record], by_record[1][record]) for record in range(rows))
    assert differ > 0.9 * rows
    # The batch of a step far on, directly, and as the loader comes to it.
    step, size = 2 * rows // 8 + 3, 8
    directly = local_batch(opened(corpus, OBJECTIVES[name]), step, size, range(size))
    with Loader(examples, size, batch_sharding(data=1)) as loader:
        for index in range(step + 1):
            reached = loader.batch(index)
    assert equal(directly, {key: np.asarray(x) for key, x in reached.items()})
    # Another seed is another noise.
    other = opened(corpus, OBJECTIVES[name], seed=1)
    assert not equal(other.rows(np.arange(8)), examples.rows(np.arange(8)))


@pytest.mark.parametrize('name', OBJECTIVES)
def test_every_document_is_there_once_an_epoch(corpus, name):
    examples = opened(corpus, OBJECTIVES[name])
    rows = examples.sources[0].records.num_rows
    batch = examples.rows(np.arange(rows))
    cache = examples.sources[0].records.cache
    if 'encoder_inputs' not in batch:
        assert np.count_nonzero(batch['segment_ids']) == cache.num_tokens
        return
    pieces = batch['encoder_segment_ids'].max(1).sum()
    assert pieces == batch['segment_ids'].max(1).sum() == len(examples.sources[0].records.plan.spans)
    ordinary = sum(
        np.count_nonzero((batch[x] < 259) & (batch[y] > 0))
        for x, y in (('encoder_inputs', 'encoder_segment_ids'), ('targets', 'segment_ids'))
    )
    # Both sides end, and a document's own end is not among the text.
    assert ordinary == cache.num_tokens - cache.num_documents + 2 * pieces


def test_padding_takes_little_room_with_span_corruption(corpus):
    examples = opened(corpus, SpanCorruption(), 256)
    rows = examples.sources[0].records.num_rows
    batch = examples.rows(np.arange(rows - 1))
    assert np.mean(batch['encoder_segment_ids'][: rows // 2] > 0) > 0.8


def test_evaluation_draws_the_same_noise_every_time(corpus):
    config = dataclasses.replace(corpus, objective=SpanCorruption())
    first, second = (config.open_evaluation(VOCABULARY, 64, progress=False)['text'] for _ in range(2))
    assert first.num_bytes == 0 and first.num_rows == second.num_rows > 1
    indices = np.arange(first.num_rows + 2)
    assert equal(first.examples.rows(indices), second.examples.rows(indices))
    padding = first.examples.rows(indices)
    assert not padding['loss_weights'][-2:].any() and not padding['encoder_segment_ids'][-2:].any()


def test_a_prefix_shows_what_it_holds_and_loss_is_after_it():
    ids = np.array([1, 1, 1, 1, 2, 2, 2, 0], np.int32)
    example = {'inputs': np.arange(8), 'targets': np.arange(1, 9), 'segment_ids': ids}
    example['loss_weights'] = (ids > 0).astype(np.float32)
    lengths = set()
    for index in range(100):
        batch = PrefixLanguageModelling()(example, record_generator(0, 0, index))
        for span in spans_of(ids):
            prefix = batch['prefix'][span]
            length = int(prefix.sum())
            assert length >= 1 and prefix[:length].all()
            np.testing.assert_array_equal(batch['loss_weights'][span], np.arange(len(prefix)) >= length - 1)
            lengths.add((len(prefix), length))
        assert batch['prefix'][-1] == batch['loss_weights'][-1] == 0
    assert lengths == {(4, 1), (4, 2), (4, 3), (4, 4), (3, 1), (3, 2), (3, 3)}


def test_one_source_under_two_objectives(corpus):
    source = corpus.components[0].source
    s_denoiser = SpanCorruption((Denoiser(0.25, None, 0),), target_length=40)
    parts = (
        Component('spans', source, 3.0, objective=SpanCorruption((Denoiser(),), target_length=40)),
        Component('prefix', source, 1.0, objective=s_denoiser),
    )
    config = dataclasses.replace(corpus, components=parts)
    assert config.kind() == 'encoder_decoder' and config.extra_ids(VOCABULARY) == 101
    examples = config.open_training(VOCABULARY, 64, progress=False)
    batch = examples.rows(np.arange(80))
    assert np.isin(batch['encoder_inputs'][:, 0], VOCABULARY.size + 100).mean() == 0.25
    clash = dataclasses.replace(parts[1], objective=dataclasses.replace(s_denoiser, target_length=41))
    with pytest.raises(UserError, match='rows of spans have'):
        dataclasses.replace(config, components=(parts[0], clash)).open_training(VOCABULARY, 64, progress=False)
    with pytest.raises(UserError, match='different models: encoder, encoder_decoder'):
        dataclasses.replace(
            config, components=(parts[0], dataclasses.replace(parts[1], objective=MaskedLanguageModelling()))
        ).kind()


def test_settings_that_do_not_go_with_an_objective(corpus):
    with pytest.raises(UserError, match="packing is 'concatenate'"):
        dataclasses.replace(corpus, objective=SpanCorruption(), packing='concatenate').kind()
    with pytest.raises(UserError, match='a stride gives context'):
        dataclasses.replace(corpus, objective=MaskedLanguageModelling(), evaluation_stride=8).kind()
    as_t5 = {'packing': 'concatenate', 'attend_across_documents': True}
    batch = opened(corpus, SpanCorruption(), 128, **as_t5).rows(np.arange(4))
    assert (batch['encoder_segment_ids'] <= 1).all() and np.mean(batch['encoder_segment_ids']) > 0.9


def test_an_objective_is_a_seqio_preprocessor():
    import tensorflow as tf

    from llm.data.tasks import as_seqio_preprocessor

    text = np.asarray([*VOCABULARY.encode('one of the documents, which is not short'), VOCABULARY.eos_id], np.int32)
    function = SpanCorruption().bind(VOCABULARY, 64)
    dataset = tf.data.Dataset.from_tensors({'targets': text, 'segment_ids': np.ones_like(text)}).repeat(2)
    ours = [function({'targets': text, 'segment_ids': np.ones_like(text)}, record_generator(7, 0, i)) for i in range(2)]
    outputs = {name: array.dtype for name, array in ours[0].items()}
    theirs = list(as_seqio_preprocessor(function, 7, outputs)(dataset).as_numpy_iterator())
    assert equal(ours[0], theirs[0]) and equal(ours[1], theirs[1]) and not equal(ours[0], ours[1])
