"""Byte-level byte pair encoding with the GPT-2 split (Radford et al. 2019, section 2.2; Sennrich et al. 2016)."""

import functools
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from llm.data.vocabularies import storage
from llm.data.vocabularies.byte_alphabet import BYTE_ALPHABET, BYTE_OF
from llm.data.vocabularies.special_tokens import SpecialTokens
from llm.data.vocabularies.tiktoken_vocabulary import GPT2_SPLIT
from llm.data.vocabularies.vocabulary import Vocabulary
from llm.errors import UserError

_ENCODER, _MERGES = 'encoder.json', 'vocab.bpe'
_HUGGING_FACE_NAMES = {_ENCODER: 'vocab.json', _MERGES: 'merges.txt'}


class ByteLevelBPE(Vocabulary):
    """Byte-level BPE: text is split by GPT-2's pattern, then bytes are merged by rank within each part.

    Args:
        token_ids: the id of every token by its spelling in GPT-2's byte alphabet, special tokens not among them.
        merges: pairs of spellings by rank.
        special_ids, roles: see `Vocabulary`.

    Raises UserError where the tables do not fit together.
    """

    kind = 'byte_level_bpe'
    # In the split pattern white space is only ever the first character of a part, or a part of white space alone. So a
    # part ends before every space or newline that follows something else, and no look-ahead crosses that place.
    boundary = re.compile(r'(?<=\S)[ \n]')

    def __init__(
        self,
        token_ids: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        special_ids: Mapping[str, int],
        roles: Mapping[str, str | None],
    ) -> None:
        self.token_ids = dict(token_ids)
        self.merges = tuple(merges)
        _check_tables(self.token_ids, self.merges, special_ids)
        rules = [json.dumps(sorted(self.token_ids.items())).encode(), json.dumps(self.merges).encode(), b'gpt2 split']
        super().__init__(len(self.token_ids) + len(special_ids), special_ids, roles, rules)

    @classmethod
    def train(cls, texts: Iterable[str], size: int, special_tokens: SpecialTokens = SpecialTokens()) -> Self:
        """A vocabulary of `size` tokens learnt from texts; the same for the same texts, whatever the threads.

        Ids: special tokens, the 256 bytes in order, merges by rank. Raises UserError when the texts are too few.
        """
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        names = special_tokens.names()
        learnt = size - len(names)
        if learnt < 256:
            raise UserError(
                f'a byte-level vocabulary cannot have {size} tokens', fix=f'Its size is at least {256 + len(names)}'
            )
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        trainer = trainers.BpeTrainer(vocab_size=learnt, initial_alphabet=BYTE_ALPHABET, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())['model']['merges']]
        if len(merges) < learnt - 256:
            raise UserError(
                f'the texts give {len(merges) + 256 + len(names)} tokens, not {size}',
                fix='Give more text, or ask for a smaller vocabulary',
            )
        spellings = BYTE_ALPHABET + [left + right for left, right in merges]
        token_ids = {spelling: len(names) + i for i, spelling in enumerate(spellings)}
        roles = {'pad': special_tokens.pad, 'eos': special_tokens.eos, 'bos': special_tokens.bos}
        return cls(token_ids, merges, {name: i for i, name in enumerate(names)}, roles)

    @classmethod
    def from_gpt2_files(cls, directory: Path, roles: Mapping[str, str | None] | None = None) -> Self:
        """GPT-2's encoder.json and vocab.bpe, or the same as vocab.json and merges.txt.

        What is neither a byte nor a merge is a special token; without `roles`, '<|endoftext|>' is both bos and eos.
        Raises UserError.
        """
        paths = [directory / name for name in (_ENCODER, _MERGES)]
        if not paths[0].exists():
            paths = [directory / name for name in _HUGGING_FACE_NAMES.values()]
        encoder, merges = storage.read_json(paths[0]), storage.read_bytes(paths[1])
        if not isinstance(encoder, dict) or not all(type(token) is int for token in encoder.values()):
            raise storage.damaged(paths[0], 'is not an object of ids by token')
        pairs = _parse_merges(merges, paths[1])
        ordinary = {*BYTE_ALPHABET, *(left + right for left, right in pairs)}
        special_ids = {name: token for name, token in encoder.items() if name not in ordinary}
        end = '<|endoftext|>' if '<|endoftext|>' in special_ids else None
        token_ids = {name: token for name, token in encoder.items() if name in ordinary}
        roles = roles or {'eos': end, 'bos': end}
        for role, name in roles.items():
            if name is not None and name not in special_ids:
                raise storage.damaged(paths[0], f'has no special token {name!r}, which is named as its {role}')
        try:
            return cls(token_ids, pairs, special_ids, roles)
        except UserError as error:
            raise storage.damaged(directory, error.what) from error

    @classmethod
    def restore(cls, settings: dict[str, Any], files: dict[str, bytes]) -> Self:
        """The vocabulary from its settings and files."""
        encoder = json.loads(files[_ENCODER])
        special_ids = settings['special_ids']
        token_ids = {name: token for name, token in encoder.items() if name not in special_ids}
        return cls(token_ids, _parse_merges(files[_MERGES], Path(_MERGES)), special_ids, settings['roles'])

    def files(self) -> dict[str, bytes]:
        """encoder.json and vocab.bpe in GPT-2's format, which other programs read."""
        encoder = dict(sorted({**self.special_ids, **self.token_ids}.items(), key=lambda item: item[1]))
        merges = ''.join(f'{left} {right}\n' for left, right in self.merges)
        return {
            _ENCODER: json.dumps(encoder, ensure_ascii=False).encode(),
            _MERGES: f'#version: 0.2\n{merges}'.encode(),
        }

    def token_bytes(self) -> list[bytes]:
        """The bytes of every token by id; b'' for special tokens."""
        table = [b''] * self.size
        for spelling, token in self.token_ids.items():
            table[token] = bytes(BYTE_OF[character] for character in spelling)
        return table

    def encode_segment(self, text: str) -> np.ndarray:
        """The ids by tiktoken, or by tokenizers for tables that tiktoken cannot follow exactly."""
        text.encode()  # raises for lone surrogates, which tiktoken would replace in silence
        if self._tiktoken is not None:
            return np.array(self._tiktoken.encode_ordinary(text), np.int32)
        return np.array(self.reference_encoder.encode(text, add_special_tokens=False).ids, np.int32)

    @functools.cached_property
    def reference_encoder(self) -> Any:
        """The same vocabulary as a `tokenizers.Tokenizer`, which defines the ids: it merges pairs as listed."""
        from tokenizers import Tokenizer, models, pre_tokenizers

        tokenizer = Tokenizer(models.BPE(vocab=self.token_ids, merges=list(self.merges)))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        return tokenizer

    @functools.cached_property
    def _tiktoken(self) -> Any | None:
        """The same vocabulary as a `tiktoken.Encoding`, several times as fast, if the ids are sure to be equal.

        tiktoken merges two neighbours whenever their concatenation is a token, by its id; the reference only when the
        pair is listed, by rank. They agree when every token has one merge, ids grow with ranks, and the reference
        encodes every token's own spelling to that token alone. For if tiktoken ever joined an unlisted pair (x, y) to
        a token t, the reference would stop at (x, y) when given the spelling of t.
        """
        spellings = [left + right for left, right in self.merges]
        ids = [self.token_ids[spelling] for spelling in spellings]
        if len(set(spellings)) < len(spellings) or any(a >= b for a, b in itertools.pairwise(ids)):
            return None
        if ids and max(self.token_ids[character] for character in BYTE_ALPHABET) > ids[0]:
            return None
        model = self.reference_encoder.model
        if any(len(model.tokenize(spelling)) > 1 for spelling in spellings):
            return None
        import tiktoken

        ranks = {bytes(BYTE_OF[c] for c in spelling): token for spelling, token in self.token_ids.items()}
        return tiktoken.Encoding(self.digest, pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={})


def _parse_merges(content: bytes, path: Path) -> list[tuple[str, str]]:
    try:
        lines = content.decode().split('\n')
    except UnicodeDecodeError as error:
        raise storage.damaged(path, 'is not UTF-8') from error
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.startswith('#version')):
            continue
        left, separator, right = line.partition(' ')
        if not left or not separator or not right or ' ' in right:
            raise storage.damaged(path, f'line {number} is not two tokens')
        pairs.append((left, right))
    return pairs


def _check_tables(
    token_ids: Mapping[str, int], merges: Sequence[tuple[str, str]], special_ids: Mapping[str, int]
) -> None:
    for byte, character in enumerate(BYTE_ALPHABET):
        if character not in token_ids:
            raise UserError(f'byte {byte} has no token: this is not a byte-level vocabulary')
    for left, right in merges:
        for spelling in (left, right, left + right):
            if spelling not in token_ids:
                raise UserError(f'the merge of {left!r} and {right!r} needs {spelling!r}, which has no id')
    ids = sorted([*token_ids.values(), *special_ids.values()])
    if ids != list(range(len(ids))):
        raise UserError(f'the ids of {len(ids)} tokens are not 0 to {len(ids) - 1}, each once')
