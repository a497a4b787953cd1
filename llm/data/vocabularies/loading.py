"""Loading a vocabulary of any kind."""

import os
from pathlib import Path

from llm.data.vocabularies import storage
from llm.data.vocabularies.byte_level_bpe import ByteLevelBPE
from llm.data.vocabularies.byte_vocabulary import ByteVocabulary
from llm.data.vocabularies.sentencepiece_vocabulary import SentencePieceVocabulary
from llm.data.vocabularies.vocabulary import Vocabulary
from llm.errors import UserError

_KINDS: dict[str, type[Vocabulary]] = {
    vocabulary.kind: vocabulary for vocabulary in (ByteVocabulary, ByteLevelBPE, SentencePieceVocabulary)
}


def load_vocabulary(path: str | os.PathLike[str]) -> Vocabulary:
    """The vocabulary at a path: a directory that `Vocabulary.save` wrote, a run directory that has it as vocabulary/,
    a directory with GPT-2's files, or a SentencePiece .model file.

    Raises UserError where there is none, and where a file is damaged or does not fit the others.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return SentencePieceVocabulary.from_file(path)
    for directory in (path, path / 'vocabulary'):
        if (directory / storage.DESCRIPTION).exists():
            return _load_saved(directory)
    if (path / 'encoder.json').exists() or (path / 'vocab.json').exists():
        return ByteLevelBPE.from_gpt2_files(path)
    raise UserError(
        'no vocabulary is here',
        where=str(path),
        fix=f'Give a directory with {storage.DESCRIPTION} (train_tokenizer writes one) or with encoder.json and '
        'vocab.bpe, or a SentencePiece .model file',
    )


def _load_saved(directory: Path) -> Vocabulary:
    stored = storage.read(directory)
    description = directory / storage.DESCRIPTION
    if stored.kind not in _KINDS:
        raise UserError(f'kind {stored.kind!r} is not one of {", ".join(_KINDS)}', where=str(description))
    try:
        vocabulary = _KINDS[stored.kind].restore(stored.settings, stored.files)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise storage.damaged(description, f'does not describe a vocabulary ({error!r})') from error
    except UserError as error:
        raise storage.damaged(directory, error.what) from error
    if vocabulary.digest != stored.digest:
        raise storage.damaged(description, 'does not fit the files beside it: their digest is another')
    return vocabulary
