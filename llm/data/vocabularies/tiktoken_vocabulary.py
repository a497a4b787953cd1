"""Vocabularies of tiktoken: byte-level BPE whose ranks are the ids, split by the pattern of a named encoding."""

import base64
import binascii
import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from llm.data.vocabularies.vocabulary import Vocabulary
from llm.errors import UserError

FILE = 'ranks.tiktoken'
_END = '<|endoftext|>'
_REPAIR = 'Take the file from where it was made'
_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
# The split of GPT-2's encoder.py. Quantifiers are possessive where that cannot change a match, for speed.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# That of cl100k_base and, without possessive quantifiers, Llama 3.
_CL100K_SPLIT = (
    rf'(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*'
    r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_UPPER, _LOWER = r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]', r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]'
_O200K_SPLIT = (
    rf'[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:{_CONTRACTIONS})?'
    rf'|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:{_CONTRACTIONS})?'
    r'|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)


@dataclasses.dataclass(frozen=True)
class TiktokenEncoding:
    """What a rank file does not say.

    Args:
        split: pattern of the parts within which bytes are merged.
        num_ranks: lines of the file, by which the encoding is recognised.
        special_ids: ids of the special tokens.
        bos, eos: names of those at both ends of a document.
    """

    split: str
    num_ranks: int
    special_ids: Mapping[str, int]
    bos: str
    eos: str


def _llama3_special_ids() -> dict[str, int]:
    """Llama 3.1's 256 special tokens, the reserved ones in the places of Llama 3."""
    first = ['<|begin_of_text|>', '<|end_of_text|>', '<|reserved_special_token_0|>', '<|reserved_special_token_1|>']
    first += ['<|finetune_right_pad_id|>', '<|reserved_special_token_2|>', '<|start_header_id|>', '<|end_header_id|>']
    first += ['<|eom_id|>', '<|eot_id|>', '<|python_tag|>']
    rest = [f'<|reserved_special_token_{i}|>' for i in range(3, 3 + 256 - len(first))]
    return {name: 128_000 + i for i, name in enumerate([*first, *rest])}


def _ending(token: int, **others: int) -> dict[str, int]:
    return {_END: token, **{f'<|{name}|>': i for name, i in others.items()}}


# Figures and patterns of tiktoken's `openai_public.py` and of Llama 3's `tokenizer.py`.
ENCODINGS = {
    'gpt2': TiktokenEncoding(GPT2_SPLIT, 50_256, _ending(50_256), _END, _END),
    'p50k_base': TiktokenEncoding(GPT2_SPLIT, 50_280, _ending(50_256), _END, _END),
    'cl100k_base': TiktokenEncoding(
        _CL100K_SPLIT,
        100_256,
        _ending(100_257, fim_prefix=100_258, fim_middle=100_259, fim_suffix=100_260, endofprompt=100_276),
        _END,
        _END,
    ),
    'o200k_base': TiktokenEncoding(_O200K_SPLIT, 199_998, _ending(199_999, endofprompt=200_018), _END, _END),
    'llama3': TiktokenEncoding(_CL100K_SPLIT, 128_000, _llama3_special_ids(), '<|begin_of_text|>', '<|end_of_text|>'),
}


class TiktokenVocabulary(Vocabulary):
    """The ranks of a named encoding. tiktoken itself encodes, so the ids are its own.

    Args:
        content: of a rank file: on each line the bytes of a token in base64, and its rank.
        encoding: a name in `ENCODINGS`; None for the one that has as many ranks.

    Raises UserError for anything else than that.
    """

    kind = 'tiktoken'
    # No pattern above has a part in which a space follows what is no white space. (A newline may follow punctuation.)
    boundary = re.compile(r'(?<=\S) ')

    def __init__(self, content: bytes, encoding: str | None = None) -> None:
        self.ranks = parse_ranks(content)
        counts = {each.num_ranks: name for name, each in ENCODINGS.items()}
        self.encoding = counts.get(len(self.ranks), '') if encoding is None else encoding
        if self.encoding not in ENCODINGS:
            raise UserError(
                f'is a tiktoken file of {len(self.ranks)} ranks, which is no encoding known here',
                fix=f'Known are {", ".join(f"{name} ({count})" for count, name in counts.items())}; any other needs a '
                'tokenizer.json',
            )
        self._content = content
        known = ENCODINGS[self.encoding]
        ids = sorted([*self.ranks.values(), *known.special_ids.values()])
        if len(set(ids)) < len(ids) or len(self.ranks) != known.num_ranks:
            raise UserError(f'does not have the ranks of {self.encoding}', fix=_REPAIR)
        roles = {'bos': known.bos, 'eos': known.eos}
        super().__init__(ids[-1] + 1, known.special_ids, roles, [content, known.split.encode()])

    @classmethod
    def restore(cls, settings: dict[str, Any], files: dict[str, bytes]) -> Self:
        """The vocabulary from its file and the name of its encoding."""
        return cls(files[FILE], settings['encoding'])

    def settings(self) -> dict[str, Any]:
        """The encoding's name, too."""
        return {**super().settings(), 'encoding': self.encoding}

    def files(self) -> dict[str, bytes]:
        """The rank file."""
        return {FILE: self._content}

    def token_bytes(self) -> list[bytes]:
        """The bytes of every token by id; b'' for special tokens and ids without a token."""
        table = [b''] * self.size
        for content, rank in self.ranks.items():
            table[rank] = content
        return table

    def encode_segment(self, text: str) -> np.ndarray:
        """The ids by tiktoken."""
        text.encode()  # raises for lone surrogates, which tiktoken would replace in silence
        return np.array(self._tiktoken.encode_ordinary(text), np.int32)

    @functools.cached_property
    def _tiktoken(self) -> Any:
        import tiktoken

        split = ENCODINGS[self.encoding].split
        return tiktoken.Encoding(self.digest, pat_str=split, mergeable_ranks=self.ranks, special_tokens={})


def looks_like_ranks(content: bytes) -> bool:
    """Whether the first line is one of a rank file."""
    return re.match(rb'[A-Za-z0-9+/]+={0,2} [0-9]+\r?(\n|$)', content) is not None


def parse_ranks(content: bytes) -> dict[bytes, int]:
    """Ranks by bytes. Raises UserError for a line that is none, a rank or token given twice, or a byte without rank."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        try:
            spelling, rank = line.split()
            token = base64.b64decode(spelling, validate=True)
            value = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(f'line {number} is not a token in base64 and its rank', fix=_REPAIR) from error
        if token in ranks:
            raise UserError(f'line {number} gives a token that an earlier line has', fix=_REPAIR)
        ranks[token] = value
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError('is a tiktoken file that lacks one of the 256 bytes', fix=_REPAIR)
    if len(set(ranks.values())) < len(ranks) or min(ranks.values()) < 0 or max(ranks.values()) >= 2 * len(ranks):
        raise UserError(f'the ranks of {len(ranks)} tokens are not small numbers, each once', fix=_REPAIR)
    return ranks
