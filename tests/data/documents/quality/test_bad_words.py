"""Lists of words against datatrove's filter, by language, and counts."""

import random

import pytest

from llm.data.documents.document import Document
from llm.data.documents.quality.bad_words import BadWords
from llm.data.documents.stage import Chain
from llm.errors import UserError

ENTRIES = {'en': ['Grue', 'two words', 'a$$x', 'é-é', "o'no"], 'th': ['คำ', 'grue']}


@pytest.fixture
def lists(tmp_path):
    for language, entries in ENTRIES.items():
        (tmp_path / f'{language}.txt').write_text('\n'.join(entries) + '\n# a comment\n\n')
    return tuple((language, str(tmp_path / f'{language}.txt')) for language in ENTRIES)


@pytest.mark.oracle
def test_the_same_documents_go_as_by_datatrove(lists, tmp_path, monkeypatch):
    from datatrove import data
    from datatrove.pipeline.filters import C4BadWordsFilter, c4_filters

    for language, entries in ENTRIES.items():  # which knows neither comments nor capitals in lists
        (tmp_path / language).write_text('\n'.join(entries).lower())
    monkeypatch.setattr(
        c4_filters, 'cached_asset_path_or_download', lambda url, **_: str(tmp_path / url.rpartition('/')[2][:2])
    )
    others = C4BadWordsFilter()
    pieces = [*ENTRIES['en'], 'คำ', 'GRUE', 'two', 'words', ' ', ' ', ', ', '-', '_', 's', 'grueful', '\n', 'É-É']
    found = set()
    for seed in range(600):
        draw = random.Random(seed)
        text, language = ''.join(draw.choices(pieces, k=draw.randint(1, 6))), draw.choice(['en', 'th'])
        (document,) = BadWords(lists)([Document('a', text, 's', language=language)])
        kept = others.filter(data.Document(text=text, id='', metadata={'language': language})) is True
        assert (document.removed_by is None) == kept, (text, language)
        found.add((language, kept))
    assert len(found) == 4


def test_counts_by_language(lists):
    texts = [('en', 'Grue, grue; two  words; two words.'), ('de', 'grue'), (None, 'grue'), ('th', 'xคำx')]
    documents = [Document('a', text, 's', language=language) for language, text in texts]
    judged = BadWords(lists, most=3)(documents)
    assert [document.verdicts[0].value for document in judged] == [3, None, None, 1]
    assert all(document.removed_by is None for document in judged)
    strict = BadWords((*lists, ('', lists[0][1])))(documents)
    assert [document.verdicts[0].value for document in strict] == [3, 1, 1, 1]
    assert {document.removed_by for document in strict} == {'bad_words'}
    before = Chain((BadWords(lists),)).identities()
    with open(lists[0][1], 'a') as file:
        file.write('new\n')
    assert Chain((BadWords(lists),)).identities() != before
    with pytest.raises(UserError, match='no file matches'):
        BadWords((('en', 'none.txt'),)).identities()
