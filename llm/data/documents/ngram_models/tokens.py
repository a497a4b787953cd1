"""Texts as sentences of token ids, for n-gram models: words, what is between white space, or a vocabulary's tokens."""

import dataclasses
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np

from llm.data.documents.deduplication.words import normalized, split_words, word_hashes
from llm.data.vocabularies import SentencePieceVocabulary, Vocabulary
from llm.data.vocabularies.byte_alphabet import spelt
from llm.errors import UserError

TokenKind = Literal['words', 'white_space', 'vocabulary']
SentenceKind = Literal['line', 'document']
Normalization = Literal['none', 'ccnet']

# Ids of what every model has, spelt as ARPA files do; a vocabulary's token t has the id t + 3.
SPECIAL = ('<unk>', '<s>', '</s>')
UNKNOWN, BEGIN, END = range(3)
# A token takes so many bits where n-grams are packed into 64; a packed 0 is no token.
BITS = 21
MAX_TOKENS = (1 << BITS) - 1

# Punctuation as text_normalizer.py of CCNet (Wenzek et al. 2020) replaces it, the full-width 1 included.
_PUNCTUATION = str.maketrans(
    dict(
        zip('，。、„”“«»１」「《》´∶：？！（）；–～’━〈〉【】％►', f""",.,{'"' * 10}'::?!();-~'-<>[]%-""", strict=True)
    )
    | {'—': ' - ', '．': '. ', '…': '...'}
)
_NOT_PRINTED = re.compile('[\x00-\x1f\x7f-\x9f]')
_DIGIT = re.compile(r'\d')


@dataclasses.dataclass(frozen=True)
class TokenConfig:
    """How texts become sentences of tokens.

    Args:
        kind: 'words' without case, accents and punctuation, as deduplication has them; what is between 'white_space',
            as it is; or the tokens of a 'vocabulary'.
        sentences: what begins with <s> and ends with </s>: a line that is not blank, or a whole 'document' (as in
            CCNet, whose tokens know no line ends).
        normalization: of the text before all: 'none', or as 'ccnet' does it for its models (lower case, no accents,
            digits to 0, plain punctuation, no control characters).
    """

    kind: TokenKind = 'words'
    sentences: SentenceKind = 'line'
    normalization: Normalization = 'none'

    def __post_init__(self) -> None:
        for name, kinds in (('kind', TokenKind), ('sentences', SentenceKind), ('normalization', Normalization)):
            if getattr(self, name) not in get_args(kinds):
                raise UserError(
                    f'{name} = {getattr(self, name)!r} is not one of {", ".join(get_args(kinds))}', where='TokenConfig'
                )


@dataclasses.dataclass(frozen=True)
class Sentences:
    """Sentences of a batch of documents, one after the other, each with <s> and </s>.

    Attributes:
        ids: int64 [total]. offsets: int64 [documents + 1]: where those of each document begin.
    """

    ids: np.ndarray
    offsets: np.ndarray


def sentences_of(
    texts: Sequence[str],
    config: TokenConfig,
    vocabulary: Vocabulary | None,
    word_ids: Callable[[list[str]], np.ndarray],
) -> Sentences:
    """The sentences of each text.

    Args:
        vocabulary: for tokens of that kind.
        word_ids: the ids of different words, for the other kinds.
    """
    if config.normalization == 'ccnet':
        texts = [normalized_as_ccnet(text) for text in texts]
    lines = [text.split('\n') for text in texts] if config.sentences == 'line' else [[text] for text in texts]
    flat = [line for some in lines for line in some]
    ids, bounds = _tokens(flat, config, vocabulary, word_ids)
    counts = np.diff(bounds)
    owners = np.repeat(np.arange(len(texts)), [len(some) for some in lines])[counts > 0]
    counts = counts[counts > 0]
    ends = np.cumsum(counts + 2)
    result = np.empty(len(ids) + 2 * len(counts), np.int64)
    inner = np.ones(len(result), np.bool_)
    inner[ends - 1] = inner[ends - counts - 2] = False
    result[ends - counts - 2], result[ends - 1], result[inner] = BEGIN, END, ids
    sizes = np.bincount(owners, weights=counts + 2, minlength=len(texts)).astype(np.int64)
    return Sentences(result, np.concatenate([[0], np.cumsum(sizes)]))


def _tokens(
    lines: list[str], config: TokenConfig, vocabulary: Vocabulary | None, word_ids: Callable[[list[str]], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """(ids of all lines, [lines + 1] where those of each begin)."""
    import pyarrow

    if config.kind == 'vocabulary':
        assert vocabulary is not None
        encoded = vocabulary.encode_batch(lines, num_threads=1)
        ids = np.concatenate([np.zeros(0, np.int32), *encoded]).astype(np.int64) + len(SPECIAL)
        if vocabulary.unk_id is not None:
            ids[ids == vocabulary.unk_id + len(SPECIAL)] = UNKNOWN
        return ids, np.concatenate([[0], np.cumsum([len(some) for some in encoded], dtype=np.int64)])
    column = normalized(lines) if config.kind == 'words' else pyarrow.array(lines, pyarrow.large_string())
    words, indices, bounds = split_words(column)
    return (word_ids(words)[indices] if words else np.zeros(0, np.int64)), bounds


def normalized_as_ccnet(text: str) -> str:
    """The text as CCNet gives it to its tokenizers and models."""
    text = text.strip().lower()
    if not text.isascii():
        text = ''.join(c for c in unicodedata.normalize('NFD', text) if unicodedata.category(c) != 'Mn')
    return _NOT_PRINTED.sub('', _DIGIT.sub('0', text).translate(_PUNCTUATION))


def token_names(vocabulary: Vocabulary) -> list[str]:
    """A name for each token, as ARPA files have them: SentencePiece's pieces, else bytes as GPT-2 writes them."""
    if isinstance(vocabulary, SentencePieceVocabulary):
        names = [piece.piece for piece in vocabulary.proto.pieces]
    else:
        names = [spelt(token) for token in vocabulary.token_bytes()]
    seen: set[str] = {'', *SPECIAL}
    for i, name in enumerate(names):
        # Special tokens, and tokens of the same bytes as another.
        names[i] = f'<token_{i}>' if name in seen else name
        seen.add(name)
    return names


class WordIndex:
    """Ids of words that come up one after the other; further words than fit are unknown."""

    def __init__(self, words: Sequence[str] = ()) -> None:
        self.words = list(words)
        # A text that spells a special token does not mean it.
        self._ids = dict.fromkeys(SPECIAL, UNKNOWN) | {word: i for i, word in enumerate(words, start=len(SPECIAL))}

    def __call__(self, words: list[str]) -> np.ndarray:
        """int64: the ids, new ones where need be."""
        ids = self._ids
        for word in words:
            if word and word not in ids and len(ids) < MAX_TOKENS:  # '' stands for texts without words
                ids[word] = len(ids)
                self.words.append(word)
        return np.array([ids.get(word, UNKNOWN) for word in words], np.int64)


class WordTable:
    """Ids of given words, by arrays that processes share.

    Args:
        hashes: uint64, rising. ids: of the words with these hashes.
    """

    def __init__(self, hashes: np.ndarray, ids: np.ndarray) -> None:
        self._hashes, self._ids = hashes, ids

    @staticmethod
    def arrays(words: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(hashes, ids) of words of which the first has the id 3."""
        hashes = word_hashes(words)
        order = np.argsort(hashes)
        return hashes[order], (order + len(SPECIAL)).astype(np.uint32)

    def __call__(self, words: list[str]) -> np.ndarray:
        """int64: the ids, of other words that of the unknown one."""
        hashes = word_hashes(words)
        if not len(self._hashes):
            return np.full(len(hashes), UNKNOWN, np.int64)
        places = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        return np.where(self._hashes[places] == hashes, self._ids[places], UNKNOWN).astype(np.int64)
