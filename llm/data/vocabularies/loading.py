"""Loading a vocabulary of any kind."""

import os
from pathlib import Path

from llm.data.vocabularies import hugging_face, storage
from llm.data.vocabularies.byte_level_bpe import ByteLevelBPE
from llm.data.vocabularies.byte_vocabulary import ByteVocabulary
from llm.data.vocabularies.sentencepiece_vocabulary import SentencePieceVocabulary
from llm.data.vocabularies.tiktoken_vocabulary import TiktokenVocabulary
from llm.data.vocabularies.tokenizer_json import TokenizerJson
from llm.data.vocabularies.vocabulary import Vocabulary
from llm.errors import UserError

_KINDS: dict[str, type[Vocabulary]] = {
    vocabulary.kind: vocabulary
    for vocabulary in (ByteVocabulary, ByteLevelBPE, SentencePieceVocabulary, TokenizerJson, TiktokenVocabulary)
}


def load_vocabulary(path: str | os.PathLike[str]) -> Vocabulary:
    """The vocabulary at a path, whatever its kind: a directory that `Vocabulary.save` wrote, a run directory that has
    it as vocabulary/, a Hugging Face directory, a directory with GPT-2's or tiktoken's files; or one file of a
    tokenizer: a tokenizer.json, a SentencePiece model or the ranks of tiktoken.

    Raises UserError where there is none, and where a file is damaged or does not fit the others.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return hugging_face.read_tokenizer_json(path) if path.suffix == '.json' else hugging_face.read_model(path)
    for directory in (path, path / 'vocabulary'):
        if (directory / storage.DESCRIPTION).exists():
            return _load_saved(directory)
    vocabulary = hugging_face.read_vocabulary(path)
    if vocabulary is None:
        raise UserError(
            'no vocabulary is here',
            where=str(path),
            fix=f'Give a directory with {storage.DESCRIPTION} (train_tokenizer writes one), one of Hugging Face, or a '
            'tokenizer.json, a SentencePiece .model or a .tiktoken file',
        )
    return vocabulary


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
