from llm.data.documents.deduplication.overlap import Overlap, overlaps


def test_equal_documents_and_shared_runs_of_words_are_found():
    held_out = {
        'set': ['The sea is deep and cold.', 'one two three four five', '', 'a b'],
        'other': ['nothing of this is there'],
    }
    training = ['THE SEA is deep, and cold', 'zero one two three four six', 'a  b!', '?']
    found = overlaps(held_out, iter(training), words=4)
    # Of the runs of four words the first text has three and the second two, one of which is found.
    assert found['set'] == Overlap(documents=4, equal=2, touched=2, share=4 / 5)
    assert found['other'] == Overlap(documents=1, equal=0, touched=0, share=0.0)


def test_documents_of_later_batches_count_and_short_texts_have_no_runs():
    held_out = {'set': ['just two'], 'long': [' '.join(map(str, range(30)))]}
    found = overlaps(held_out, (str(i) for i in range(600)))
    assert found == {'set': Overlap(1, 0, 0, 0.0), 'long': Overlap(1, 0, 0, 0.0)}
    found = overlaps(held_out, ['just two', *['x'] * 600, ' '.join(map(str, range(10, 40)))])
    assert found == {'set': Overlap(1, 1, 0, 0.0), 'long': Overlap(1, 0, 1, 8 / 18)}
    assert overlaps({'set': ['just two']}, ['just two']) == {'set': Overlap(1, 1, 0, 0.0)}
