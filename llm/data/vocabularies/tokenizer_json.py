"""Vocabularies from elsewhere that are described by a tokenizer.json, run by the library it was made for: `tokenizers`.

Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019), BPE with byte fallback, WordPiece (Wu et al. 2016), Unigram
(Kudo 2018) and WordLevel, with whatever normalisation and splitting the file asks for.
"""

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import numpy as np

from llm.data.vocabularies.byte_alphabet import BYTE_OF
from llm.data.vocabularies.vocabulary import Spans, Vocabulary
from llm.errors import UserError

FILE = 'tokenizer.json'
_BYTE_TOKEN = re.compile('<0x([0-9A-F]{2})>')
_REPAIR = 'Take the file from where it was made'


class TokenizerJson(Vocabulary):
    """A tokenizer.json. What it adds around a text (bos, [CLS]) is left to whoever makes documents or chats of texts.

    Args:
        content: of the file.
        roles: names of the tokens that are pad, eos, bos and unk. They count as special, whatever the file says.
            Without one for unk, the file's own.

    Raises UserError where `tokenizers` cannot run the file, or it lacks a token of a role.

    Attributes:
        lossless: whether decoding gives back every text. Only byte-level ones that normalise nothing are; the others
            decode as the file says, and `token_bytes` need not add up to the text.
    """

    kind = 'tokenizer_json'
    boundary = re.compile('(?!)')  # nothing is known of where a text may be cut: nowhere

    def __init__(self, content: bytes, roles: Mapping[str, str | None]) -> None:
        self._content = content
        described = _parse(content)
        # Texts are whole here, and what is put around them is for others to say: it would shift the spans, too.
        described.update(post_processor=None, truncation=None, padding=None)
        self._described = described
        named = {role: name for role, name in roles.items() if name is not None}
        plain = self._build(described)
        unknown = named.get('unk', _unknown_token(described['model']))
        if unknown is not None and plain.token_to_id(unknown) is not None:
            named['unk'] = unknown
        for role, name in named.items():
            if plain.token_to_id(name) is None:
                raise UserError(f'has no token {name!r}, which is named as its {role}', fix=_REPAIR)
        _mark_special(described, {name: plain.token_to_id(name) for role, name in named.items() if role != 'unk'})
        self._added = dict(self._tokenizer.get_added_tokens_decoder())
        special_ids = {token.content: i for i, token in self._added.items() if token.special}
        special_ids |= {name: plain.token_to_id(name) for name in named.values()}
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        size = max(ids, default=-1) + 1
        if size > 2 * len(ids) + 1024:
            raise UserError(f'gives ids up to {size - 1} to {len(ids)} tokens', fix=_REPAIR)
        if not size:
            raise UserError('has no tokens', fix=_REPAIR)
        # Another release of `tokenizers` may write the same file in another way: the digest is of what is in it.
        meaning = json.dumps(described, sort_keys=True).encode()
        super().__init__(size, dict(sorted(special_ids.items(), key=lambda item: item[1])), named, [meaning])
        self._unwanted = np.array([i for n, i in self.special_ids.items() if n != named.get('unk')], np.int32)
        self.lossless = _is_lossless(described, self._added.values()) and set(BYTE_OF) <= set(plain.get_vocab())

    @classmethod
    def restore(cls, settings: dict[str, Any], files: dict[str, bytes]) -> Self:
        """The vocabulary from its file and its roles."""
        return cls(files[FILE], settings['roles'])

    def files(self) -> dict[str, bytes]:
        """The tokenizer.json as it was read."""
        return {FILE: self._content}

    def token_bytes(self) -> list[bytes]:
        """What each id adds to the text behind other tokens; b'' for special tokens and ids without a token."""
        table = [b''] * self.size
        spell = _speller(self._described.get('decoder'))
        special = set(self.special_ids.values())
        for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if i not in special:
                table[i] = self._added[i].content.encode() if i in self._added else spell(token)
        return table

    def encode_segment(self, text: str) -> np.ndarray:
        """The ids; names of special tokens in the text are text, as everywhere in this project."""
        text.encode()  # raises for lone surrogates
        ids = np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
        return self._spell_out(ids) if self._unwanted.size and np.isin(ids, self._unwanted).any() else ids

    def encode_marked(self, text: str) -> tuple[list[int], Spans]:
        """The ids where names of special tokens stand for these, and the span of each; see `Vocabulary`."""
        text.encode()
        encoding = self._marking_tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the tokens; as the file's own decoder gives it unless that is of bytes."""
        ids = [int(i) for i in ids]
        if self._of_bytes or not ids:
            return super().decode(ids)
        self.decode_bytes([min(ids), max(ids)])  # raises for ids outside
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _segments(self, text: str) -> list[str]:
        return [text]

    @functools.cached_property
    def _of_bytes(self) -> bool:
        types = {part['type'] for part in _parts(self._described.get('decoder'))}
        return types == {'ByteLevel'}

    @functools.cached_property
    def _tokenizer(self) -> Any:
        tokenizer = self._build(self._described)
        tokenizer.encode_special_tokens = True
        return tokenizer

    @functools.cached_property
    def _marking_tokenizer(self) -> Any:
        return self._build(self._described)

    def _build(self, described: dict[str, Any]) -> Any:
        import tokenizers

        try:
            return tokenizers.Tokenizer.from_str(json.dumps(described))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # what the library cannot take may be an Exception or a panic, no Exception
            reason = ' '.join(str(error).split())[:200]
            raise UserError(f'cannot be used as a tokenizer.json ({reason})', fix=_REPAIR) from error

    def _spell_out(self, ids: np.ndarray) -> np.ndarray:
        """The ids with each special token put as its characters: a Unigram model takes their names for pieces."""
        names = {i: name for name, i in self.special_ids.items()}
        unwanted = set(self._unwanted.tolist())
        parts: list[int] = []
        for i in ids.tolist():
            if i not in unwanted:
                parts.append(i)
                continue
            for character in names[i]:
                spelt = self._tokenizer.model.tokenize(character)
                parts += [token.id for token in spelt if token.id not in unwanted]
        return np.array(parts, np.int32)


def token_names(content: bytes) -> tuple[dict[int, str], set[str]]:
    """The tokens of a tokenizer.json by id, as far as it says, and which are special. Raises UserError."""
    described = _parse(content)
    vocab = described['model'].get('vocab')
    names: dict[int, str] = {}
    if isinstance(vocab, dict):
        names = {i: name for name, i in vocab.items() if isinstance(i, int)}
    elif isinstance(vocab, list):
        names = {i: piece[0] for i, piece in enumerate(vocab) if isinstance(piece, list) and piece}
    added = described['added_tokens']
    special = {token['content'] for token in added if token['special']}
    return names | {token['id']: token['content'] for token in added}, special


def _parse(content: bytes) -> dict[str, Any]:
    try:
        described = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f'is not JSON ({error})', fix=_REPAIR) from error
    if not isinstance(described, dict) or not isinstance(described.get('model'), dict):
        raise UserError("is no tokenizer.json: it has no object 'model'", fix=_REPAIR)
    added = described['added_tokens'] = described.get('added_tokens') or []
    fields = (('id', int), ('content', str), ('special', bool))
    if not isinstance(added, list) or any(
        not isinstance(token, dict) or any(not isinstance(token.get(key), kind) for key, kind in fields)
        for token in added
    ):
        raise UserError("is no tokenizer.json: its 'added_tokens' are not tokens", fix=_REPAIR)
    return described


def _unknown_token(model: dict[str, Any]) -> str | None:
    if isinstance(model.get('unk_token'), str):
        return model['unk_token']
    index, pieces = model.get('unk_id'), model.get('vocab')
    return pieces[index][0] if isinstance(pieces, list) and isinstance(index, int) and index < len(pieces) else None


def _mark_special(described: dict[str, Any], ids: Mapping[str, int]) -> None:
    """Make the named tokens special ones in the description."""
    added = described['added_tokens'] = list(described['added_tokens'])
    for name, i in ids.items():
        flags = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False, 'special': True}
        known = next((n for n, token in enumerate(added) if token['content'] == name), None)
        if known is None:
            added.append({'id': i, 'content': name, **flags})
        elif not added[known]['special']:
            added[known] = {**added[known], 'special': True}
    added.sort(key=lambda token: token['id'])


def _parts(component: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The steps of a normaliser, pre-tokenizer or decoder, sequences taken apart."""
    if component is None:
        return
    inner = next((component[k] for k in ('decoders', 'normalizers', 'pretokenizers') if k in component), None)
    if inner is None:
        yield component
    for part in inner or ():
        yield from _parts(part)


def _is_lossless(described: dict[str, Any], added: Iterable[Any]) -> bool:
    if next(_parts(described.get('normalizer')), None) is not None:
        return False
    if any(token.lstrip or token.rstrip for token in added if not token.special):
        return False
    splits = list(_parts(described.get('pre_tokenizer')))
    return (
        any(part['type'] == 'ByteLevel' for part in splits)
        and all(part['type'] == 'ByteLevel' for part in _parts(described.get('decoder')))
        and all(
            part['type'] == 'Digits'
            or (part['type'] == 'ByteLevel' and not part['add_prefix_space'])
            or (part['type'] == 'Split' and part['behavior'] != 'Removed')
            for part in splits
        )
    )


def _speller(decoder: dict[str, Any] | None) -> Any:
    """A function from a token's spelling to the bytes that it adds to a text, by what the decoder does."""
    parts = {part['type']: part for part in _parts(decoder)}
    if 'ByteLevel' in parts:
        return lambda token: bytes(BYTE_OF[c] for c in token) if all(c in BYTE_OF for c in token) else token.encode()
    if 'WordPiece' in parts:
        prefix = parts['WordPiece'].get('prefix', '##')
        return lambda token: (token[len(prefix) :] if token.startswith(prefix) else f' {token}').encode()
    if 'BPEDecoder' in parts:
        suffix = parts['BPEDecoder'].get('suffix', '</w>')
        return lambda token: token.replace(suffix, ' ').encode()
    if not parts:
        return lambda token: f' {token}'.encode()  # without a decoder, tokens are words
    replaced = [(part['replacement'], ' ') for part in _parts(decoder) if part['type'] == 'Metaspace']
    replaced += [
        (part['pattern']['String'], part['content'])
        for part in _parts(decoder)
        if part['type'] == 'Replace' and 'String' in part['pattern']
    ]

    def spell(token: str) -> bytes:
        if 'ByteFallback' in parts and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for old, new in replaced:
            token = token.replace(old, new)
        return token.encode()

    return spell
