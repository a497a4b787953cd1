"""BERT's WordPiece ('bert') in a GGUF file: tokens that begin a word have a '▁' there, others no '##'."""

from typing import Any

from llm.data.vocabularies import TokenizerJson
from llm.data.vocabularies.wordpiece import wordpiece_json
from llm.errors import UserError
from llm.interop.gguf.tokens import CONTROL, NORMAL, UNKNOWN, UNUSED, Stored, broken

KIND = 'bert'
_START, _INSIDE = '▁', '##'
_SPECIAL = (CONTROL, UNKNOWN)


def read_wordpiece(stored: Stored) -> TokenizerJson:
    """The vocabulary of such a file.

    Raises:
        UserError: a token stands there twice, or there is none for the unknown.
    """
    lowercase = bool(stored.metadata.get('normalizer.lowercase', True))
    ids: dict[str, int] = {}
    for i, (token, kind) in enumerate(zip(stored.tokens, stored.kinds, strict=True)):
        special = kind in _SPECIAL or i in stored.ids.values() or (token.startswith('[') and token.endswith(']'))
        spelt = token if special else token[1:] if token.startswith(_START) else f'{_INSIDE}{token}'
        if ids.setdefault(spelt, i) != i:
            raise broken(stored.where, f'has the token {spelt!r:.40} twice')
    roles = {role: None if token is None else stored.tokens[token] for role, token in stored.ids.items()}
    unknown = roles['unk']
    if unknown is None:
        raise broken(stored.where, 'has no token for what is unknown')
    content = wordpiece_json(
        ids,
        [token for token, i in ids.items() if stored.kinds[i] in _SPECIAL or i in stored.ids.values()],
        unknown=unknown,
        lowercase=lowercase,
        strip_accents=bool(stored.metadata.get('normalizer.strip_accents', lowercase)),
    )
    return TokenizerJson(content, roles)


def write_wordpiece(vocabulary: TokenizerJson, described: dict[str, Any]) -> dict[str, Any]:
    """Keys for a vocabulary, which a tokenizer.json describes.

    Raises:
        UserError: it splits or normalises in another way than BERT.
    """
    model, rules = described['model'], described.get('normalizer') or {}
    usual = (
        rules.get('type') == 'BertNormalizer'
        and rules.get('clean_text')
        and rules.get('handle_chinese_chars')
        and described.get('pre_tokenizer') == {'type': 'BertPreTokenizer'}
        and model.get('continuing_subword_prefix') == _INSIDE
        and vocabulary.unk_id is not None
    )
    if not usual:
        raise UserError(
            'llama.cpp knows no WordPiece but that of BERT',
            where=repr(vocabulary),
            fix='Export the model to a Hugging Face directory.',
        )
    tokens = [f'[UNUSED{i}]' for i in range(vocabulary.size)]
    kinds = [UNUSED] * vocabulary.size
    for token, i in model['vocab'].items():
        tokens[i] = token.removeprefix(_INSIDE) if token.startswith(_INSIDE) else f'{_START}{token}'
        kinds[i] = NORMAL
    for name, i in vocabulary.special_ids.items():
        tokens[i], kinds[i] = name, CONTROL
    lowercase, strip = bool(rules.get('lowercase')), rules.get('strip_accents')
    found: dict[str, Any] = {
        'model': KIND,
        'pre': 'default',
        'tokens': tokens,
        'token_type': kinds,
        'normalizer.lowercase': lowercase,
        'normalizer.strip_accents': lowercase if strip is None else strip,
    }
    if vocabulary.eos_id is not None:
        found['seperator_token_id'] = vocabulary.eos_id
    return found
