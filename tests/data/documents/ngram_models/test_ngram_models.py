"""N-gram models against KenLM: estimated as lmplz does, scored as its Python module does, read and written as ARPA."""

import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from llm.data.documents.ngram_models import load_ngram_model
from llm.data.documents.ngram_models.arpa import read_arpa, write_arpa
from llm.data.documents.ngram_models.building import build_ngram_model
from llm.data.documents.ngram_models.counting import read_counts, write_counts
from llm.data.documents.ngram_models.estimating import KneserNey
from llm.data.documents.ngram_models.model import DESCRIPTION, NgramModel, check_content
from llm.data.documents.ngram_models.tables import build_table, find, keys_of
from llm.data.documents.ngram_models.tokens import TokenConfig, normalized_as_ccnet, token_names
from llm.data.vocabularies import ByteVocabulary, SentencePieceVocabulary, SpecialTokens
from llm.errors import UserError
from tests.data.documents.ngram_models.made_up_text import OTHERS, TEXT

HERE = Path(__file__).parent
WHITE_SPACE = TokenConfig('white_space')


def build(directory: Path, texts=('\n'.join(TEXT),), **settings) -> NgramModel:
    directory.mkdir()
    build_ngram_model(texts, settings.pop('held_out', ()), directory, **settings)
    return load_ngram_model(str(directory))


@pytest.fixture(scope='module')
def estimated(tmp_path_factory):
    """By us, with memory for a fraction of the counts."""
    config = KneserNey(4, (0, 0, 1))
    directory = tmp_path_factory.mktemp('ngram') / 'model'
    # Blank lines, and another cut into documents, are the same sentences.
    texts = ['\n'.join(TEXT[:150]), '', '\n\n'.join(TEXT[150:]) + '\n \n']
    return build(directory, texts, config=config, tokens=WHITE_SPACE, memory_bytes=40_000)


def entries(lines: list[str]) -> dict[str, tuple[float, ...]]:
    """N-gram -> probability and back-off, of an ARPA file; and its counts."""
    found: dict[str, tuple[float, ...]] = {}
    for line in lines:
        fields = line.rstrip('\n').split('\t')
        if len(fields) > 1:
            found[fields[1]] = (float(fields[0]), float(fields[2]) if len(fields) > 2 else 0.0)
        elif line.startswith('ngram '):
            found[line.strip()] = ()
    return found


def test_it_estimates_what_lmplz_does_and_writes_it(estimated, tmp_path):
    write_arpa(estimated, tmp_path / 'ours.arpa')
    ours = entries((tmp_path / 'ours.arpa').read_text().splitlines())
    theirs = entries(gzip.decompress((HERE / 'lmplz.arpa.gz').read_bytes()).decode().splitlines())
    assert ours.keys() == theirs.keys() and len(theirs) > 3_500
    # lmplz calculates in float32 and writes seven figures.
    worst = max(abs(a - b) for name in ours for a, b in zip(ours[name], theirs[name], strict=True))
    assert worst < 1e-5


def test_more_memory_gives_the_same_bits(estimated, tmp_path):
    build(tmp_path / 'model', config=KneserNey(4, (0, 0, 1)), tokens=WHITE_SPACE)
    for name in ('ngrams_1.npy', 'ngrams_2.npy', 'ngrams_3.npy', 'ngrams_4.npy', 'words.txt'):
        assert (tmp_path / 'model' / name).read_bytes() == (estimated.directory / name).read_bytes()


def test_counts_come_in_many_pieces_that_are_one_order(tmp_path):
    ids = np.random.default_rng(0).integers(3, 40, 3_000)
    ids[::9], ids[8::9] = 1, 2
    runs = write_counts((part for part in np.split(ids[:2_997], 3)), 5, tmp_path, memory_bytes=60_000)
    pieces = list(read_counts(runs, 60_000))
    assert len(runs) > 1 and len(pieces) > 3
    together = np.concatenate(pieces)
    assert together['count'].sum() == (ids[:2_997] != 1).sum()
    order = np.lexsort((together['node'], together['key']))
    assert (order == np.arange(len(together))).all() and len(np.unique(together)) == len(together)


def test_scores_are_those_of_kenlm(estimated, tmp_path):
    read_arpa(str(HERE / 'lmplz.arpa.gz'), tmp_path / 'model', WHITE_SPACE)
    theirs = json.loads((HERE / 'kenlm.json').read_text())
    for model in (load_ngram_model(str(tmp_path / 'model')), estimated):
        ids = model.sentences(OTHERS).ids
        scores = model.log10_probabilities(ids)[ids != 1]
        np.testing.assert_allclose(scores, np.concatenate(theirs), atol=1e-5)
        # Per token, </s> counted; what stands beside a text changes no bit of it.
        expected = [10 ** -(sum(some) / len(some)) for some in theirs]
        together = model.perplexities(OTHERS)
        np.testing.assert_allclose(together, expected, rtol=1e-5)
        assert model.perplexities(OTHERS[3:4]) == together[3:4]
        two = model.perplexities([f'{OTHERS[0]}\n\n{OTHERS[1]}', '', ' \n', OTHERS[0]], min_tokens=3)
        both = theirs[0] + theirs[1]
        assert two[0] == pytest.approx(10 ** -(sum(both) / len(both)), rel=1e-5) and np.isnan(two[1:]).all()


def total(model: NgramModel, context: list[int]) -> float:
    """Sum of the probabilities of all tokens after a context."""
    tokens = np.delete(np.arange(len(model.unigrams)), 1)
    ids = np.concatenate([[*context, token] for token in tokens])
    scores = model.log10_probabilities(ids).reshape(len(tokens), -1)[:, -1]
    return float((10.0 ** scores.astype(np.float64)).sum())


def test_probabilities_after_any_context_add_up_to_one(estimated, tmp_path):
    vocabulary = ByteVocabulary()
    tokens = TokenConfig('vocabulary', sentences='document')
    of_bytes = build(tmp_path / 'bytes', TEXT[:100], config=KneserNey(6), tokens=tokens, vocabulary=vocabulary)
    assert 1 in of_bytes.facts['fallback_discounts']  # there are few bytes, and none of them is rare
    for model, text in ((estimated, OTHERS[-1]), (of_bytes, 'pr\x00\u20ac')):
        ids = model.sentences([text]).ids[:-1]
        for length in range(1, len(ids) + 1):
            assert total(model, ids[:length].tolist()) == pytest.approx(1, abs=1e-5)


def test_a_vocabulary_survives_arpa_and_must_be_the_one(tmp_path):
    vocabulary = SentencePieceVocabulary.train(TEXT, 300, 'bpe', SpecialTokens())
    tokens = TokenConfig('vocabulary', 'document', 'ccnet')
    model = build(tmp_path / 'model', TEXT, held_out=OTHERS, config=KneserNey(3), tokens=tokens, vocabulary=vocabulary)
    assert len(model.percentiles) == 101 and model.percentiles[100] == pytest.approx(model.perplexities(OTHERS).max())
    write_arpa(model, tmp_path / 'model.arpa')
    read_arpa(str(tmp_path / 'model.arpa'), tmp_path / 'again', tokens, vocabulary)
    again = load_ngram_model(str(tmp_path / 'again'))
    np.testing.assert_array_equal(again.unigrams, model.unigrams)
    np.testing.assert_array_equal(again.perplexities(OTHERS), model.perplexities(OTHERS))
    with pytest.raises(UserError, match='is no token of the vocabulary'):
        read_arpa(str(tmp_path / 'model.arpa'), tmp_path / 'other', tokens, ByteVocabulary())
    names = token_names(ByteVocabulary())
    assert len(set(names)) == len(names) and not any(' ' in name for name in names)

    description = json.loads((tmp_path / 'again' / DESCRIPTION).read_text())
    (tmp_path / 'again' / DESCRIPTION).write_text(json.dumps(description | {'vocabulary': 'other'}))
    with pytest.raises(UserError, match='is not the vocabulary that the model was estimated with'):
        load_ngram_model(str(tmp_path / 'again'))


def test_text_is_normalised_as_by_ccnet():
    # What cc_net.text_normalizer.normalize gives (Wenzek et al. 2020).
    text = ' Élan vital — “Ünïcode”，１９ \t… 3½ » ok。\x85\n'
    assert normalized_as_ccnet(text) == 'elan vital  -  "unicode",00 ... 0½ " ok.'


ARPA = r"""
\data\
ngram 1=4
ngram 2=2

\1-grams:
-1	<unk>	0
0	<s>	-0.5
-0.7	</s>	0
-0.4	a	-0.3

\2-grams:
-0.2	<s> a
-0.6	a </s>

\end\
"""


@pytest.mark.parametrize(
    ('old', 'new', 'where', 'what'),
    [
        ('\\data\\', 'data', ':2', r'is not \\data\\'),
        ('ngram 2=2', 'ngram 3=2', ':4', 'is not ngram 2=NUMBER'),
        ('ngram 2=2\n', '', '', 'up to 1 tokens'),
        ('-0.7\t</s>', 'x\t</s>', ':9', "is no 1-gram: 'x </s> 0'"),
        ('-0.7\t</s>', '0.7\t</s>', ':9', 'is no 1-gram'),
        ('\t-0.3', '\tnan', ':10', 'is no 1-gram'),
        ('-0.4\ta\t', '-0.4\t</s>\t', ':10', "'</s>' is there twice"),
        ('<s> a', '<s> b', ':13', "'b' is no 1-gram"),
        ('<s> a', 'b a', ':13', "'b' is no 1-gram"),
        ('<s> a', '<s> a a', ':13', 'is no 2-gram'),
        ('<s> a', 'a </s>', '', 'an n-gram is there twice among the 2-grams'),
        ('ngram 2=2', 'ngram 2=3', ':16', 'is no 2-gram'),
        ('ngram 2=2', 'ngram 2=1', ':14', r'is not \\end\\'),
        ('\\end\\\n', '', '', r'ends before \\end\\'),
    ],
)
def test_a_bad_line_of_an_arpa_file_is_named(old, new, where, what, tmp_path):
    path = tmp_path / 'model.arpa'
    path.write_text(ARPA.replace(old, new, 1))
    with pytest.raises(UserError, match=what) as caught:
        read_arpa(str(path), tmp_path / 'model', WHITE_SPACE)
    assert caught.value.where == f'{path}{where}'


def test_an_arpa_file_without_a_context_is_refused_and_without_unk_is_read(tmp_path):
    path = tmp_path / 'model.arpa'
    trigrams = ARPA.replace('2=2\n', '2=2\nngram 3=1\n').replace('\\end\\', '\\3-grams:\n-0.1\ta a </s>\n\n\\end\\')
    path.write_text(trigrams)
    with pytest.raises(UserError, match="there is no 2-gram 'a a', the context of this one"):
        read_arpa(str(path), tmp_path / 'model', WHITE_SPACE)
    path.write_text(ARPA.replace('1=4', '1=3').replace('-1\t<unk>\t0\n', ''))
    read_arpa(str(path), tmp_path / 'model', WHITE_SPACE)
    model = load_ngram_model(str(tmp_path / 'model'))
    # <s> a b </s>: what follows an unknown word is a unigram.
    np.testing.assert_allclose(model.log10_probabilities(np.array([1, 3, 0, 2])), [0, -0.2, -100.3, -0.7], rtol=1e-6)


def test_damaged_directories_are_told(estimated, tmp_path):
    with pytest.raises(UserError, match='there is no such directory'):
        load_ngram_model(str(tmp_path / 'none'))
    with pytest.raises(UserError, match='this is not the directory of an n-gram model'):
        load_ngram_model(str(tmp_path))
    good = {path.name: path.read_bytes() for path in estimated.directory.iterdir() if path.is_file()}
    table = good['ngrams_3.npy']
    flipped = bytes([*table[:-9], table[-9] ^ 1, *table[-8:]])
    for name, content, what in (
        ('ngrams_3.npy', table[:-5], 'ngrams_3.npy: cannot be read'),
        ('ngrams_3.npy', good['ngrams_1.npy'], 'ngrams_3.npy: has '),
        ('ngrams_1.npy', good['ngrams_1.npy'][:-8], 'ngrams_1.npy: cannot be read'),
        ('ngrams_3.npy', flipped, 'ngrams_3.npy: is not the file'),
        (DESCRIPTION, b'{"format": 1}', 'does not describe an n-gram model'),
        (DESCRIPTION, b'[', 'cannot be read as JSON'),
    ):
        directory = tmp_path / hashlib.sha256(content + what.encode()).hexdigest()[:8]
        directory.mkdir()
        for other, data in {**good, name: content}.items():
            (directory / other).write_bytes(data)
        with pytest.raises(UserError, match=what):
            load_ngram_model(str(directory))
            check_content(str(directory))


def test_no_text_and_too_many_orders_are_refused(tmp_path):
    with pytest.raises(UserError, match='there is no text to estimate an n-gram model from'):
        build(tmp_path / 'model', [' \n'], config=KneserNey(), tokens=WHITE_SPACE)
    for order, prune in ((1, (0,)), (7, (0,)), (3, (1, 0)), (3, ())):
        with pytest.raises(UserError):
            KneserNey(order, prune)


def test_tables_find_what_is_there_and_nothing_else():
    generator = np.random.default_rng(0)
    keys = np.unique(keys_of(generator.integers(0, 50, 3_000), generator.integers(0, 2_000, 3_000)))
    table, places = build_table(keys, -np.arange(len(keys)), np.zeros(len(keys)))
    found, some = find(table, keys)
    assert (found == places).all() and (some['probability'] == -np.arange(len(keys))).all()
    for size in range(1, 60):  # in small ones chains go on at the beginning
        some = generator.choice(keys, size, replace=False)
        small, places = build_table(some, np.zeros(size), np.zeros(size))
        assert (find(small, some)[0] == places).all()
    others = np.setdiff1d(keys_of(np.arange(50).repeat(500), np.tile(np.arange(500), 50)), keys)
    assert (find(table, others)[0] == -1).all()
    with pytest.raises(ValueError, match='twice'):
        build_table(np.repeat(keys[:4], 2), np.zeros(8), np.zeros(8))
