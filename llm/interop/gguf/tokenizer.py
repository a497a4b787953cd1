"""The tokenizer inside a GGUF file: a SentencePiece model ('llama'), or byte-level BPE ('gpt2') with a named split."""

import json
from collections.abc import Callable
from typing import Any

from llm.data.vocabularies import SentencePieceVocabulary, TokenizerJson, Vocabulary
from llm.data.vocabularies.tiktoken_vocabulary import ENCODINGS, GPT2_SPLIT
from llm.data.vocabularies.tokenizer_json_export import as_tokenizer_json
from llm.errors import UserError
from llm.interop.gguf.format import GgufFile

_START = 'tokenizer.ggml.'
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_ROLES = {'bos': 'bos_token_id', 'eos': 'eos_token_id', 'pad': 'padding_token_id', 'unk': 'unknown_token_id'}
_SINGLE_DIGITS = ENCODINGS['llama3'].split.replace(r'\p{N}{1,3}', r'\p{N}')

_Split = tuple[tuple[str, Any], ...]
_WHOLE: _Split = (('bytes', False),)
_GPT2: _Split = (('bytes', True),)
# How text is split, by llama.cpp's name: steps, and whether what is a token as a whole is not merged.
_SPLITS: dict[str, tuple[_Split, bool]] = {
    'gpt-2': (_GPT2, False),
    'starcoder': ((('digits', True), *_GPT2), False),
    'llama-bpe': ((('split', ENCODINGS['llama3'].split), *_WHOLE), True),
    'qwen2': ((('split', _SINGLE_DIGITS), *_WHOLE), False),
    'gpt-4o': ((('split', ENCODINGS['o200k_base'].split), *_WHOLE), True),
}
_ALIASES = {
    'refact': 'starcoder',
    'command-r': 'starcoder',
    'smollm': 'starcoder',
    'llama3': 'llama-bpe',
    'llama-v3': 'llama-bpe',
}
# The same splits as written by others.
_SAME: dict[_Split, _Split] = {(('split', GPT2_SPLIT), *_WHOLE): _GPT2}


def read_tokenizer(file: GgufFile) -> Vocabulary:
    """The vocabulary of a file.

    Raises:
        UserError: there is none, it is of a kind or has a split that is not known, or its lists do not fit together.
    """
    where = str(file.path)
    metadata = {key.removeprefix(_START): value for key, value in file.metadata.items() if key.startswith(_START)}
    makers: dict[Any, Callable[..., Vocabulary]] = {'llama': _sentencepiece, 'gpt2': _byte_level}
    kind = metadata.get('model')
    if kind not in makers:
        what = 'has no tokenizer' if kind is None else f'has a tokenizer of the kind {kind!r:.40}'
        raise UserError(what, where=where, fix='Get the tokenizer from its Hugging Face directory.')
    tokens = metadata.get('tokens')
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise _broken(where, 'has no list of tokens')
    kinds = metadata.get('token_type', [_NORMAL] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens) or not set(kinds) <= set(range(7)):
        raise _broken(where, f'has {len(tokens)} tokens and no kind for each')
    ids = {role: metadata.get(key) for role, key in _ROLES.items()}
    for role, token in ids.items():
        if token is not None and (type(token) is not int or not 0 <= token < len(tokens)):
            raise _broken(where, f'gives {token!r:.40} as {role}, and has {len(tokens)} tokens')
    try:
        return makers[kind](metadata, tokens, kinds, ids, where)
    except UserError as error:
        raise error if error.where else UserError(error.what, where=where, fix=error.fix) from error


def _sentencepiece(
    metadata: dict[str, Any], tokens: list[str], kinds: list[int], ids: dict[str, int | None], where: str
) -> Vocabulary:
    from sentencepiece import sentencepiece_model_pb2

    scores = metadata.get('scores')
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise _broken(where, f'has {len(tokens)} tokens and no score for each')
    proto: Any = vars(sentencepiece_model_pb2)['ModelProto']()
    types = proto.SentencePiece
    by_kind = {
        _UNKNOWN: types.UNKNOWN,
        _CONTROL: types.CONTROL,
        _USER_DEFINED: types.USER_DEFINED,
        _UNUSED: types.UNUSED,
        _BYTE: types.BYTE,
    }
    if ids['unk'] is None and _UNKNOWN in kinds:
        ids = {**ids, 'unk': kinds.index(_UNKNOWN)}
    for i, (token, score, kind) in enumerate(zip(tokens, scores, kinds, strict=True)):
        # SentencePiece wants one unknown token, and that is it.
        kind = _UNKNOWN if i == ids['unk'] else _CONTROL if kind == _UNKNOWN else kind  # noqa: PLW2901
        proto.pieces.add(piece=token, score=score, type=by_kind.get(kind, types.NORMAL))
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.vocab_size = trainer.BPE, len(tokens)
    trainer.byte_fallback = _BYTE in kinds
    for role, index in ids.items():
        setattr(trainer, f'{role}_id', -1 if index is None else index)
        if index is not None:
            setattr(trainer, f'{role}_piece', tokens[index])
    rules.name, rules.escape_whitespaces = 'identity', True
    rules.add_dummy_prefix = bool(metadata.get('add_space_prefix', True))
    rules.remove_extra_whitespaces = False
    return SentencePieceVocabulary(proto.SerializeToString())


def _byte_level(
    metadata: dict[str, Any], tokens: list[str], kinds: list[int], ids: dict[str, int | None], where: str
) -> Vocabulary:
    name = metadata.get('pre')
    name = _ALIASES.get(str(name), name)
    if name not in _SPLITS:
        raise UserError(
            f'how its tokenizer splits text, {name!r:.40}, is not known',
            where=where,
            fix=f'Known are {", ".join(_SPLITS)}; get the tokenizer from its Hugging Face directory.',
        )
    merges = metadata.get('merges', [])
    pairs = [merge.split(' ') for merge in merges if isinstance(merge, str)] if isinstance(merges, list) else [[]]
    if len(pairs) != len(merges) or any(len(pair) != 2 for pair in pairs):
        raise _broken(where, 'has merges that are not pairs')
    split, whole_first = _SPLITS[name]
    flags = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False}
    added = [
        {'id': i, 'content': token, 'special': kind != _USER_DEFINED, **flags}
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    described = {
        'version': '1.0',
        'truncation': None,
        'padding': None,
        'added_tokens': added,
        'normalizer': None,
        'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [_as_json(*step) for step in split]},
        'post_processor': None,
        'decoder': _as_json('bytes', True),
        'model': {
            'type': 'BPE',
            'ignore_merges': whole_first,
            'vocab': {token: i for i, token in enumerate(tokens)},
            'merges': pairs,
        },
    }
    roles = {role: None if token is None or role == 'unk' else tokens[token] for role, token in ids.items()}
    return TokenizerJson(json.dumps(described).encode(), roles)


def tokenizer_metadata(vocabulary: Vocabulary, num_rows: int) -> dict[str, Any]:
    """Keys and values for a vocabulary.

    Args:
        num_rows: of the model's embedding; ids that no token has get a name that says so.

    Raises:
        UserError: it is of a kind that llama.cpp does not run.
    """
    if isinstance(vocabulary, SentencePieceVocabulary):
        found = _of_sentencepiece(vocabulary)
    else:
        found = _of_byte_level(vocabulary)
    missing = range(len(found['tokens']), num_rows)
    found['tokens'] += [f'[PAD{i}]' for i in missing]
    found['token_type'] += [_UNUSED for _ in missing]
    if 'scores' in found:
        found['scores'] += [-1e9 for _ in missing]
    # Without these llama.cpp takes ids of its own. A document lies between bos and eos, or two of the one there is.
    start, end = vocabulary.bos_id, vocabulary.eos_id
    ids = {'bos': end if start is None else start, 'eos': start if end is None else end, 'unk': vocabulary.unk_id}
    if vocabulary.roles['pad'] is not None:
        ids['pad'] = vocabulary.pad_id
    found |= {_ROLES[role]: token for role, token in ids.items() if token is not None}
    found |= {'add_bos_token': start is not None and start != end, 'add_eos_token': False}
    return {f'{_START}{key}': value for key, value in found.items()}


def _of_sentencepiece(vocabulary: SentencePieceVocabulary) -> dict[str, Any]:
    proto = vocabulary.proto
    trainer, rules, types = proto.trainer_spec, proto.normalizer_spec, proto.SentencePiece
    if trainer.model_type != trainer.BPE or rules.precompiled_charsmap or rules.remove_extra_whitespaces:
        raise UserError(
            'of SentencePiece, a GGUF file holds BPE without normalisation alone',
            where='the vocabulary',
            fix='Train the model with a vocabulary of kind byte_level_bpe, or export it to a Hugging Face directory.',
        )
    kinds = {
        types.UNKNOWN: _UNKNOWN,
        types.CONTROL: _CONTROL,
        types.USER_DEFINED: _USER_DEFINED,
        types.UNUSED: _UNUSED,
        types.BYTE: _BYTE,
    }
    return {
        'model': 'llama',
        'pre': 'default',
        'tokens': [piece.piece for piece in proto.pieces],
        'scores': [float(piece.score) for piece in proto.pieces],
        'token_type': [kinds.get(piece.type, _NORMAL) for piece in proto.pieces],
        'add_space_prefix': rules.add_dummy_prefix,
    }


def _of_byte_level(vocabulary: Vocabulary) -> dict[str, Any]:
    described = json.loads(as_tokenizer_json(vocabulary))
    model = described['model']
    split = _steps(described.get('pre_tokenizer'))
    split = _GPT2 if split == _WHOLE and not model.get('merges') else _SAME.get(split, split)
    whole_first = bool(model.get('ignore_merges'))
    names = [name for name, known in _SPLITS.items() if known[0] == split and (known[1] or not whole_first)]
    if model.get('type') != 'BPE' or described.get('normalizer') is not None or not names:
        raise UserError(
            'llama.cpp has no name for how this vocabulary splits text',
            where=repr(vocabulary),
            fix='Export the model to a Hugging Face directory.',
        )
    tokens = [f'[UNUSED{i}]' for i in range(vocabulary.size)]
    kinds = [_UNUSED] * vocabulary.size
    for token, i in model['vocab'].items():
        tokens[i], kinds[i] = token, _NORMAL
    for added in described['added_tokens']:
        tokens[added['id']] = added['content']
        kinds[added['id']] = _CONTROL if added['special'] else _USER_DEFINED
    for name, i in vocabulary.special_ids.items():
        tokens[i], kinds[i] = name, _CONTROL
    merges = [merge if isinstance(merge, str) else ' '.join(merge) for merge in model['merges']]
    return {'model': 'gpt2', 'pre': names[0], 'tokens': tokens, 'token_type': kinds, 'merges': merges}


def _as_json(kind: str, value: Any) -> dict[str, Any]:
    if kind == 'bytes':
        return {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': value}
    if kind == 'digits':
        return {'type': 'Digits', 'individual_digits': value}
    return {'type': 'Split', 'pattern': {'Regex': value}, 'behavior': 'Isolated', 'invert': False}


def _steps(described: dict[str, Any] | None) -> _Split:
    """The steps of a pre-tokenizer, as far as they are of the kinds in `_as_json`."""
    if described is None:
        return ()
    parts = described.get('pretokenizers', [described])
    steps = []
    for part in parts:
        kind = {'ByteLevel': 'bytes', 'Digits': 'digits', 'Split': 'split'}.get(part['type'], part['type'])
        value = part.get('use_regex', part.get('individual_digits', part.get('pattern', {}).get('Regex')))
        wanted = _as_json(kind, value)
        # Of where a token is found, not of which.
        known = {**part, 'trim_offsets': True} == {**wanted, 'trim_offsets': True}
        steps.append((kind, value) if known else ('unknown', str(part)))
    return tuple(steps)


def _broken(where: str, what: str) -> UserError:
    return UserError(what, where=where, fix='Get the file again, from where it was made.')
