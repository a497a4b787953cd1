"""Training a vocabulary from documents, on a sample that depends on their content and not on their order."""

import dataclasses
import hashlib
import heapq
import re
from collections.abc import Iterable
from typing import Literal

from llm.data.vocabularies.byte_level_bpe import ByteLevelBPE
from llm.data.vocabularies.byte_vocabulary import ByteVocabulary
from llm.data.vocabularies.sentencepiece_vocabulary import SentencePieceVocabulary
from llm.data.vocabularies.special_tokens import SpecialTokens
from llm.data.vocabularies.vocabulary import Vocabulary, cut
from llm.errors import UserError

# Documents are sampled in parts of about this length, so that one long book does not fill the sample.
_PART_CHARACTERS = 16 * 1024
_PART_END = re.compile(r'(?<=\n)')


@dataclasses.dataclass(frozen=True)
class VocabularyConfig:
    """Which vocabulary to train.

    Args:
        kind: 'bytes' (needs no training), 'byte_level_bpe' (GPT-2's), or SentencePiece's two algorithms.
        size: number of tokens, special tokens and the 256 bytes included. None for 'bytes', and where the job knows
            what the model wants.
        sample_bytes: bytes of text to learn from, of all there is.
        seed: another seed gives another sample.
        special_tokens: their names.
    """

    kind: Literal['bytes', 'byte_level_bpe', 'sentencepiece_bpe', 'sentencepiece_unigram'] = 'byte_level_bpe'
    size: int | None = None
    sample_bytes: int = 100_000_000
    seed: int = 0
    special_tokens: SpecialTokens = SpecialTokens()

    def __post_init__(self) -> None:
        if self.kind == 'bytes':
            fits = 256 + len(self.special_tokens.names())
            if self.size not in (None, fits):
                raise UserError(
                    f'a vocabulary of bytes cannot have {self.size} tokens', fix=f'Set size to None or {fits}'
                )
        if self.sample_bytes <= 0:
            raise UserError(f'sample_bytes = {self.sample_bytes} is not positive')

    def required_size(self) -> int:
        """The size of a kind that is trained. Raises UserError if there is none."""
        if self.size is None:
            raise UserError(f'a vocabulary of kind {self.kind!r} needs a size', where='VocabularyConfig.size')
        return self.size


def train_vocabulary(config: VocabularyConfig, documents: Iterable[str]) -> Vocabulary:
    """The vocabulary that `config` asks for, learnt from a sample of the documents.

    The result depends on the set of documents only, not on their order. Raises UserError when there is too little text.
    """
    if config.kind == 'bytes':
        return ByteVocabulary(config.special_tokens)
    return train_on_sample(config, sample_documents(documents, config.sample_bytes, config.seed))


def train_on_sample(config: VocabularyConfig, texts: list[str]) -> Vocabulary:
    """The vocabulary that `config` asks for, learnt from all of these texts."""
    if config.kind == 'bytes':
        return ByteVocabulary(config.special_tokens)
    size = config.required_size()
    if config.kind == 'byte_level_bpe':
        return ByteLevelBPE.train(texts, size, config.special_tokens)
    return SentencePieceVocabulary.train(
        texts, size, 'bpe' if config.kind == 'sentencepiece_bpe' else 'unigram', config.special_tokens
    )


def sample_documents(documents: Iterable[str], num_bytes: int, seed: int) -> list[str]:
    """Parts of documents, chosen evenly: those with the smallest hashes of (seed, content), `num_bytes` in all.

    One pass and no more memory than the sample and one document. The last part is cut short so that the sample has
    exactly `num_bytes` of UTF-8 (less than four fewer where a character does not fit); all is taken where there is
    less. The parts are in the order of their hashes, whatever the order of the documents.
    """
    key = f'vocabulary sample {seed}'.encode()
    chosen: list[tuple[int, int, bytes]] = []  # a heap with the largest hash first: (-hash, serial number, text)
    total = serial = 0
    for document in documents:
        for part in cut(document, _PART_END, _PART_CHARACTERS, 2 * _PART_CHARACTERS):
            content = part.encode()
            rank = int.from_bytes(hashlib.blake2b(content, digest_size=16, key=key).digest(), 'big')
            if total >= num_bytes and -rank < chosen[0][0]:
                continue
            heapq.heappush(chosen, (-rank, serial, content))
            serial += 1
            total += len(content)
            while total - len(chosen[0][2]) >= num_bytes:
                total -= len(heapq.heappop(chosen)[2])
    parts = [content for _, _, content in sorted(chosen, reverse=True)]
    if total > num_bytes:
        parts[-1] = parts[-1][: len(parts[-1]) - (total - num_bytes)]
    return [part.decode(errors='ignore') for part in parts]
