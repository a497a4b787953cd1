"""How well a vocabulary fits texts: bytes per token, fertility, and which of its tokens they use."""

import dataclasses
import re
from collections.abc import Iterable

import numpy as np

from llm.data.vocabularies.vocabulary import Vocabulary

_WORD = re.compile(r'\S+')
_BATCH = 256


@dataclasses.dataclass(frozen=True)
class Fit:
    """What encoding some texts came to.

    Args:
        documents, bytes, words, tokens: how many; a word is a run of characters without white space.
        uses: how often each token came up, int64 [size].
    """

    documents: int
    bytes: int
    words: int
    tokens: int
    uses: np.ndarray

    @property
    def bytes_per_token(self) -> float:
        """Bytes of UTF-8 that a token stands for on average: the more, the shorter the sequences."""
        return self.bytes / max(1, self.tokens)

    @property
    def fertility(self) -> float:
        """Tokens per word (Ács 2019); means little in scripts that do not put spaces between words."""
        return self.tokens / max(1, self.words)


def measure_fit(vocabulary: Vocabulary, texts: Iterable[str]) -> Fit:
    """Encode the texts and count."""
    uses = np.zeros(vocabulary.size, np.int64)
    documents = num_bytes = words = 0
    batch: list[str] = []

    def count_batch() -> None:
        for ids in vocabulary.encode_batch(batch):
            uses[:] += np.bincount(ids, minlength=vocabulary.size)
        batch.clear()

    for text in texts:
        documents += 1
        num_bytes += len(text.encode())
        words += sum(1 for _ in _WORD.finditer(text))
        batch.append(text)
        if len(batch) == _BATCH:
            count_batch()
    count_batch()
    return Fit(documents, num_bytes, words, int(uses.sum()), uses)
