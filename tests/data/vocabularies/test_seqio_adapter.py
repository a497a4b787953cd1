"""Our vocabularies behind SeqIO's interface."""

import pickle

import pytest

TEXTS = ['Hello world', '', 'Ärger 🦙\n\tdef f(x):', '<eos>']


@pytest.fixture(scope='module')
def seqio():
    import seqio

    return seqio


def test_it_encodes_and_decodes_as_ours_in_python_and_in_tensorflow(seqio, vocabulary):
    import tensorflow as tf

    adapter = vocabulary.as_seqio()
    assert isinstance(adapter, seqio.Vocabulary)
    assert adapter.vocab_size == vocabulary.size
    ids = (vocabulary.pad_id, vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id)
    assert (adapter.pad_id, adapter.bos_id, adapter.eos_id, adapter.unk_id) == ids
    for text in TEXTS:
        expected = vocabulary.encode(text)
        assert adapter.encode(text) == expected
        assert adapter.decode(expected) == text
        encoded = adapter.encode_tf(tf.constant(text))
        assert encoded.numpy().tolist() == expected
        assert adapter.decode_tf(encoded).numpy().decode() == text
    rows = tf.constant([vocabulary.encode('ab\n'), vocabulary.encode('cd\n')][:1])
    assert adapter.decode_tf(rows).shape == (1,)


def test_seqio_s_preprocessors_take_it(seqio, vocabulary):
    import tensorflow as tf

    feature = seqio.Feature(vocabulary.as_seqio(), add_eos=True)
    dataset = tf.data.Dataset.from_tensor_slices({'targets': TEXTS[:3]})
    dataset = seqio.preprocessors.tokenize(dataset, {'targets': feature}, copy_pretokenized=False)
    dataset = seqio.preprocessors.append_eos(dataset, {'targets': feature})
    rows = [row['targets'].tolist() for row in dataset.as_numpy_iterator()]
    assert rows == [[*vocabulary.encode(text), vocabulary.eos_id] for text in TEXTS[:3]]


def test_adapters_of_equal_vocabularies_are_equal_and_can_be_pickled(seqio, trained):
    del seqio
    adapters = [vocabulary.as_seqio() for vocabulary in trained.values()]
    assert len(set(adapters)) == len(adapters)
    assert [pickle.loads(pickle.dumps(adapter)) for adapter in adapters] == adapters
