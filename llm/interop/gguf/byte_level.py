"""Byte-level BPE ('gpt2') in a GGUF file, with a split of text that has a name."""

import json
from typing import Any

from llm.data.vocabularies import TokenizerJson, Vocabulary
from llm.data.vocabularies.tiktoken_vocabulary import ENCODINGS, GPT2_SPLIT
from llm.errors import UserError
from llm.interop.gguf.tokens import CONTROL, NORMAL, UNUSED, USER_DEFINED, Stored, broken

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


def read_byte_level(stored: Stored) -> Vocabulary:
    """The vocabulary of such a file.

    Raises:
        UserError: its split is not known, or its merges are none.
    """
    tokens, where = stored.tokens, stored.where
    name = stored.metadata.get('pre')
    name = _ALIASES.get(str(name), name)
    if not isinstance(name, str) or name not in _SPLITS:
        raise UserError(
            f'how its tokenizer splits text, {name!r:.40}, is not known',
            where=where,
            fix=f'Known are {", ".join(_SPLITS)}; get the tokenizer from its Hugging Face directory.',
        )
    merges = stored.metadata.get('merges', [])
    pairs = [merge.split(' ') for merge in merges if isinstance(merge, str)] if isinstance(merges, list) else []
    if not isinstance(merges, list) or len(pairs) != len(merges) or any(len(pair) != 2 for pair in pairs):
        raise broken(where, 'has merges that are not pairs')
    split, whole_first = _SPLITS[name]
    flags = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False}
    added = [
        {'id': i, 'content': token, 'special': kind != USER_DEFINED, **flags}
        for i, (token, kind) in enumerate(zip(tokens, stored.kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED)
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
    roles = {role: None if token is None or role == 'unk' else tokens[token] for role, token in stored.ids.items()}
    return TokenizerJson(json.dumps(described).encode(), roles)


def write_byte_level(vocabulary: Vocabulary, described: dict[str, Any]) -> dict[str, Any]:
    """Keys for a vocabulary, which a tokenizer.json describes.

    Raises:
        UserError: llama.cpp has no name for how it splits text.
    """
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
    kinds = [UNUSED] * vocabulary.size
    for token, i in model['vocab'].items():
        tokens[i], kinds[i] = token, NORMAL
    for added in described['added_tokens']:
        tokens[added['id']] = added['content']
        kinds[added['id']] = CONTROL if added['special'] else USER_DEFINED
    for name, i in vocabulary.special_ids.items():
        tokens[i], kinds[i] = name, CONTROL
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
