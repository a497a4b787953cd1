import dataclasses
import json

import pytest

from llm.data.sources import TextFiles
from llm.data.vocabularies.training import VocabularyConfig, sample_documents, train_on_sample
from llm.errors import UserError
from llm.jobs.training_run import check_size, train_on_groups
from tests.models.small_decoders import DECODER


@pytest.fixture
def sources(tmp_path):
    """A large source of one sort of words and a small one of others, and their documents."""
    texts = [[f'{"abcdefgh"[i % 8] * 4} sea {i}' for i in range(200)], [f'cold {i}' for i in range(30)]]
    found = []
    for number, some in enumerate(texts):
        path = tmp_path / f'{number}.jsonl'
        path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in some))
        found.append(TextFiles(str(path), validation_fraction=0.0))
    return found, texts


def test_a_vocabulary_is_learnt_from_as_much_of_each_group_as_the_smallest_has(sources):
    groups, texts = [[source] for source in sources[0]], sources[1]
    config = VocabularyConfig('byte_level_bpe', sample_bytes=4000)
    smallest = sum(map(len, texts[1]))
    expected = {
        even: train_on_sample(
            VocabularyConfig('byte_level_bpe', 280),
            [part for some in texts for part in sample_documents(some, smallest if even else 2000, 0)],
        )
        for even in (True, False)
    }
    for even in (True, False):
        assert train_on_groups(config, groups, 280, even=even) == expected[even]
    assert expected[True] != expected[False]
    # Two sources of one group share what a group gets.
    assert train_on_groups(config, [[sources[0][0], sources[0][0]]], 280) == train_on_sample(
        VocabularyConfig('byte_level_bpe', 280), 2 * sample_documents(texts[0], 2000, 0)
    )
    assert train_on_groups(config, groups, 280, lambda vocabulary: 10).size == 270


def test_a_vocabulary_that_does_not_fit():
    vocabulary = train_on_sample(VocabularyConfig('bytes'), [])
    model = dataclasses.replace(DECODER, vocab_size=260)
    check_size(vocabulary, model, 1)
    with pytest.raises(UserError, match='the vocabulary has 259 tokens, the objective 2 of its own, and the model 260'):
        check_size(vocabulary, model, 2)
