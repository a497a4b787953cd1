"""Pairs of texts as rows of tokens, for embeddings: arrays of each side, as `llm.training.contrastive` reads them."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from llm.data.labelled.files import LabelledExample
from llm.data.labelled.rows import digest_of, number_of, text_rows, write_row
from llm.data.objectives import Example
from llm.data.token_cache import Boundaries
from llm.data.vocabularies import Vocabulary
from llm.errors import UserError

_SIDES = ('', 'positive_', 'negative_')


class PairRows:
    """Rows [n, S] of texts and what belongs to them, perhaps also of what does not: each side's inputs, segment_ids and
    positions; and loss_weights, 1 at a token of each row.

    A text without a second one is paired with itself. Texts that a row cannot hold are cut at their ends.

    Attributes:
        examples: as given. scores: [n], how alike the texts of each are said to be; None where nothing is said.
        cut: how many texts were cut.

    Raises:
        UserError: a text is empty, a score is not a number, only some examples have one, or a row is too short.
    """

    def __init__(self, examples: Sequence[LabelledExample], vocabulary: Vocabulary, sequence_length: int) -> None:
        self.examples, self.num_rows, self.cut = tuple(examples), len(examples), 0
        if sequence_length < 4:
            raise UserError('rows are too short for examples', where='StepConfig.sequence_length', fix='Use more.')
        self._room, self._vocabulary, self._boundaries = sequence_length, vocabulary, Boundaries.of(vocabulary)
        self.scores = self._scores()
        sides = _SIDES[: max(2, *(len(example.texts) for example in examples))]
        self._arrays: Example = {'loss_weights': np.zeros((self.num_rows + 1, sequence_length), np.float32)}
        for side in sides:
            self._arrays |= text_rows(self.num_rows + 1, sequence_length, pad=self._boundaries.pad, side=side)
        for row, example in enumerate(self.examples):
            self._arrays['loss_weights'][row, 0] = 1
            texts = [self._tokens(text, example.where) for text in example.texts]
            for side, tokens in zip(sides, texts * 2 if len(texts) == 1 else texts, strict=True):
                write_row(self._arrays, row, tokens, side)
        self.digest = digest_of(self._arrays, ['pairs', vocabulary.digest, sequence_length])

    def rows(self, indices: npt.ArrayLike) -> Example:
        """Rows by number; a number of num_rows or more gives a row of padding."""
        chosen = np.minimum(np.asarray(indices, np.int64), self.num_rows)
        return {name: array[chosen] for name, array in self._arrays.items()}

    def _scores(self) -> npt.NDArray[np.float64] | None:
        said = [str(example.label) for example in self.examples]
        if not any(said):
            return None
        return np.array([number_of(example, label) for example, label in zip(self.examples, said, strict=True)])

    def _tokens(self, text: str, where: str) -> list[int]:
        if not text.strip():
            raise UserError('a text of a pair is empty', where=where, fix='Leave the record out, or complete it.')
        tokens = self._vocabulary.encode(text)
        self.cut += len(tokens) + 2 > self._room
        return [self._boundaries.start, *tokens[: self._room - 2], self._boundaries.end]
