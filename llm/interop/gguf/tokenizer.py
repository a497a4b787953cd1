"""The tokenizer inside a GGUF file: SentencePiece ('llama', 't5'), byte-level BPE ('gpt2') or WordPiece ('bert')."""

import json
from collections.abc import Callable
from typing import Any

from llm.data.vocabularies import SentencePieceVocabulary, TokenizerJson, Vocabulary
from llm.data.vocabularies.tokenizer_json_export import as_tokenizer_json
from llm.errors import UserError
from llm.interop.gguf.byte_level import read_byte_level, write_byte_level
from llm.interop.gguf.format import GgufFile
from llm.interop.gguf.sentencepiece import read_sentencepiece, write_sentencepiece
from llm.interop.gguf.tokens import ROLES, UNUSED, Stored, read_tokens
from llm.interop.gguf.wordpiece import read_wordpiece, write_wordpiece

_START = 'tokenizer.ggml.'
_READERS: dict[Any, Callable[[Stored], Vocabulary]] = {
    'llama': read_sentencepiece,
    't5': read_sentencepiece,
    'gpt2': read_byte_level,
    'bert': read_wordpiece,
}


def read_tokenizer(file: GgufFile) -> Vocabulary:
    """The vocabulary of a file.

    Raises:
        UserError: there is none, it is of a kind or has a split that is not known, or its lists do not fit together.
    """
    where = str(file.path)
    metadata = {key.removeprefix(_START): value for key, value in file.metadata.items() if key.startswith(_START)}
    kind = metadata.get('model')
    if not isinstance(kind, str) or kind not in _READERS:
        what = 'has no tokenizer' if kind is None else f'has a tokenizer of the kind {kind!r:.40}'
        raise UserError(what, where=where, fix='Get the tokenizer from its Hugging Face directory.')
    try:
        return _READERS[kind](read_tokens(metadata, where))
    except UserError as error:
        raise error if error.where else UserError(error.what, where=where, fix=error.fix) from error


def tokenizer_metadata(vocabulary: Vocabulary, num_rows: int) -> dict[str, Any]:
    """Keys and values for a vocabulary.

    Args:
        num_rows: of the model's embedding; ids that no token has get a name that says so.

    Raises:
        UserError: it is of a kind that llama.cpp does not run.
    """
    found = _keys(vocabulary)
    missing = range(len(found['tokens']), num_rows)
    found['tokens'] += [f'[PAD{i}]' for i in missing]
    found['token_type'] += [UNUSED for _ in missing]
    if 'scores' in found:
        found['scores'] += [-1e9 for _ in missing]
    # Without these llama.cpp takes ids of its own. A document lies between bos and eos, or two of the one there is.
    start, end = vocabulary.bos_id, vocabulary.eos_id
    ids = {'bos': end if start is None else start, 'eos': start if end is None else end, 'unk': vocabulary.unk_id}
    if vocabulary.roles['pad'] is not None:
        ids['pad'] = vocabulary.pad_id
    found |= {ROLES[role]: token for role, token in ids.items() if token is not None}
    found |= {'add_bos_token': start is not None and start != end, 'add_eos_token': False}
    return {f'{_START}{key}': value for key, value in found.items()}


def _keys(vocabulary: Vocabulary) -> dict[str, Any]:
    if isinstance(vocabulary, SentencePieceVocabulary):
        return write_sentencepiece(vocabulary)
    described = json.loads(as_tokenizer_json(vocabulary))
    if isinstance(vocabulary, TokenizerJson) and described['model'].get('type') == 'WordPiece':
        return write_wordpiece(vocabulary, described)
    return write_byte_level(vocabulary, described)
