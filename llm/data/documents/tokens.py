"""Exact numbers of tokens in the ledger, of removed documents as well: an annotation that can also be a rule."""

import dataclasses
import functools
from collections.abc import Sequence

from llm.data.documents.bounds import Bounds
from llm.data.documents.document import Document, Verdict
from llm.data.vocabularies import Vocabulary, load_vocabulary
from llm.errors import UserError

RULE = 'tokens'


@dataclasses.dataclass(frozen=True)
class TokenCount:
    """Counts each document's tokens, without special ones, as its text is when it comes to this stage.

    Args:
        vocabulary: path, as `load_vocabulary` takes it: a directory of train_tokenizer or of Hugging Face, or a file.
        least, most: tokens of documents that stay; without them all do.
    """

    vocabulary: str
    least: int | None = None
    most: int | None = None

    name = RULE
    rules = (RULE,)

    def __post_init__(self) -> None:
        if self.least is not None and self.most is not None and self.least > self.most:
            raise UserError(f'least = {self.least} is above most = {self.most}', where='TokenCount')

    @property
    def bounds(self) -> tuple[Bounds, ...]:
        return (Bounds(RULE, self.least, self.most),)

    def identities(self) -> list[str]:
        """Change where the vocabulary does."""
        return [_vocabulary(self.vocabulary).digest]

    def __call__(self, documents: Sequence[Document]) -> list[Document]:
        # One thread: documents are prepared by a process for each processor.
        counts = map(len, _vocabulary(self.vocabulary).encode_batch((d.text for d in documents), num_threads=1))
        (bounds,) = self.bounds
        return [
            document.judged(Verdict(RULE, bounds.keeps(count), count))
            for document, count in zip(documents, counts, strict=True)
        ]


@functools.lru_cache(maxsize=2)
def _vocabulary(path: str) -> Vocabulary:
    """Read once in a process."""
    return load_vocabulary(path)
