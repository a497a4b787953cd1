"""Labelled examples as rows of tokens: the same arrays as rows of text, with targets where the answer is read.

A row is one example. Its loss is taken at the tokens whose `loss_weights` are 1, and `targets` are there what the head
of the model is to say: a class at one token of the text, a tag at one token of each word, a number, or the next token
of an answer. So classification, tagging and generation are one loss, and no other part of training knows of them.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from llm.data.labelled.files import LabelledExample, Task
from llm.data.objectives import Example
from llm.data.token_cache import Boundaries
from llm.data.vocabularies import Vocabulary
from llm.errors import UserError

# Where a text's class is read, and a word's tag: decoders have seen all of it at the last token; encoders (BERT) take
# the first.
ReadAt = Literal['last', 'first']


def label_names(examples: Sequence[LabelledExample], task: Task) -> tuple[str, ...]:
    """The classes or tags that occur, sorted; () where labels are no classes."""
    if task == 'classification':
        return tuple(sorted({str(example.label) for example in examples}))
    if task == 'tagging':
        return tuple(sorted({tag for example in examples for tag in example.label}))
    return ()


def text_rows(rows: int, length: int, *, pad: int, side: str = '') -> Example:
    """What a model reads of `rows` texts of up to `length` tokens, still padding; names begin with `side`."""
    return {
        f'{side}inputs': np.full((rows, length), pad, np.int32),
        f'{side}segment_ids': np.zeros((rows, length), np.int32),
        f'{side}positions': np.zeros((rows, length), np.int32),
    }


def write_row(arrays: Example, row: int, tokens: Sequence[int], side: str = '') -> None:
    """Put a text into a row of `text_rows`."""
    arrays[f'{side}inputs'][row, : len(tokens)] = tokens
    arrays[f'{side}segment_ids'][row, : len(tokens)] = 1
    arrays[f'{side}positions'][row, : len(tokens)] = np.arange(len(tokens))


def digest_of(arrays: Example, settings: object) -> str:
    """Of rows: SHA-256 of their arrays and of what they were made with."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name in sorted(arrays):
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def number_of(example: LabelledExample, label: str) -> float:
    """A label that is a number.

    Raises:
        UserError: it is none, or not a finite one.
    """
    try:
        number = float(label)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f'the label {label!r} is not a number', where=example.where, fix='Check it.')
    return number


class LabelledRows:
    """Rows [n, S] of examples, one each: inputs, targets, loss_weights, segment_ids, positions.

    Texts that a row cannot hold are cut at their ends, a pair's longer one first; an answer is kept before its prompt.

    Args:
        labels: the classes or tags, by id; see `label_names`.
        read_at: see ReadAt.
        token_types: whether rows say which tokens are of the second text, as BERT reads them.
        target_length: tokens of an answer, for encoder-decoders: the encoder reads the text, the decoder the answer,
            which begins with padding as T5's does. None for decoders and encoders.

    Attributes:
        examples: as given.
        cut: how many of them were cut.

    Raises:
        UserError: a label is not one of `labels`, or not a number; or a row is too short for anything.
    """

    def __init__(
        self,
        examples: Sequence[LabelledExample],
        vocabulary: Vocabulary,
        task: Task,
        sequence_length: int,
        labels: tuple[str, ...],
        read_at: ReadAt = 'last',
        *,
        token_types: bool = False,
        target_length: int | None = None,
    ) -> None:
        self.examples, self.task, self.labels, self.read_at = tuple(examples), task, labels, read_at
        self.num_rows, self.cut = len(self.examples), 0
        self._vocabulary, self._boundaries = vocabulary, Boundaries.of(vocabulary)
        self._ids = {label: index for index, label in enumerate(labels)}
        if sequence_length < 4:
            raise UserError('rows are too short for examples', where='StepConfig.sequence_length', fix='Use more.')
        self._room = sequence_length
        shape = (self.num_rows + 1, target_length or sequence_length)  # the last is padding
        number = np.float32 if task == 'regression' else np.int32
        self._arrays: Example = {
            **text_rows(*shape, pad=self._boundaries.pad),
            'targets': np.zeros(shape, number),
            'loss_weights': np.zeros(shape, np.float32),
        }
        if token_types:
            self._arrays['token_types'] = np.zeros(shape, np.int32)
        if target_length is not None:
            self._arrays |= text_rows(shape[0], sequence_length, pad=self._boundaries.pad, side='encoder_')
        for row, example in enumerate(self.examples):
            read: Sequence[tuple[int, int | float]]
            if target_length is not None:
                source, tokens, read = self._two_sided(example, target_length)
                write_row(self._arrays, row, source, 'encoder_')
            else:
                tokens, read = self._generation(example) if task == 'generation' else self._labelled(example)
            write_row(self._arrays, row, tokens)
            if token_types and task != 'tagging' and len(example.texts) == 2:
                second = tokens.index(self._boundaries.end, 1) + 1
                self._arrays['token_types'][row, second : len(tokens)] = 1
            for position, target in read:
                self._arrays['targets'][row, position] = target
                self._arrays['loss_weights'][row, position] = 1
        self.digest = digest_of(self._arrays, [task, labels, vocabulary.digest, read_at, sequence_length])

    def rows(self, indices: npt.ArrayLike) -> Example:
        """Rows by number; a number of num_rows or more gives a row of padding."""
        chosen = np.minimum(np.asarray(indices, np.int64), self.num_rows)
        return {name: array[chosen] for name, array in self._arrays.items()}

    def target(self, example: LabelledExample, label: str) -> int | float:
        """The number that stands for a label: of its class, or itself."""
        if self.task == 'regression':
            return number_of(example, label)
        if label not in self._ids:
            known = ', '.join(self.labels[:20])
            raise UserError(
                f'the label {label!r} does not occur in the training files',
                where=example.where,
                fix=f'There is {known}{" ..." if len(self.labels) > 20 else ""}.',
            )
        return self._ids[label]

    def _labelled(self, example: LabelledExample) -> tuple[list[int], list[tuple[int, int | float]]]:
        """(tokens, [(position, target)]) of a text, a pair, or tagged words."""
        start, end = self._boundaries.start, self._boundaries.end
        if self.task == 'tagging':
            words = self._words(example.texts)
            tokens, read = [start], []
            for word, tag in zip(words, example.label, strict=True):
                if len(tokens) + len(word) >= self._room:
                    self.cut += 1
                    break
                position = len(tokens) + (len(word) - 1 if self.read_at == 'last' else 0)
                read.append((position, self.target(example, tag)))
                tokens += word
            return [*tokens, end], read
        texts = self._shortened([self._vocabulary.encode(text) for text in example.texts])
        tokens = [start]
        for text in texts:
            tokens += [*text, end]
        position = len(tokens) - 1 if self.read_at == 'last' else 0
        return tokens, [(position, self.target(example, str(example.label)))]

    def _words(self, words: Sequence[str]) -> list[list[int]]:
        """The tokens of each word of a sentence, at least one."""
        texts = [word if index == 0 else f' {word}' for index, word in enumerate(words)]
        unknown = self._boundaries.pad if self._vocabulary.unk_id is None else self._vocabulary.unk_id
        return [self._vocabulary.encode(text) or [unknown] for text in texts]

    def _shortened(self, texts: list[list[int]]) -> list[list[int]]:
        excess = 1 + sum(len(text) + 1 for text in texts) - self._room
        if excess <= 0:
            return texts
        self.cut += 1
        lengths = [len(text) for text in texts]
        for _ in range(excess):
            lengths[int(np.argmax(lengths))] -= 1
        return [text[:length] for text, length in zip(texts, lengths, strict=True)]

    def _generation(self, example: LabelledExample) -> tuple[list[int], list[tuple[int, int]]]:
        """A prompt and its answer, which ends with the boundary; inputs are one behind targets."""
        prompt = [self._boundaries.start, *self._vocabulary.encode(example.texts[0])]
        answer = [*self._vocabulary.encode(str(example.label)), self._boundaries.end]
        if len(prompt) + len(answer) - 1 > self._room:
            self.cut += 1
            answer = answer[: self._room]
            prompt = prompt[max(0, len(prompt) - max(1, self._room + 1 - len(answer))) :]
        tokens = [*prompt, *answer]
        read = [(position, tokens[position + 1]) for position in range(len(prompt) - 1, len(tokens) - 1)]
        return tokens[:-1], read

    def _two_sided(
        self, example: LabelledExample, target_length: int
    ) -> tuple[list[int], list[int], list[tuple[int, int | float]]]:
        """(what the encoder reads, what the decoder reads, [(position, target)]) of a text and its answer."""
        end = self._boundaries.end
        source = [token for text in example.texts for token in [*self._vocabulary.encode(text), end]]
        answer = [*self._vocabulary.encode(str(example.label)), end]
        if len(source) > self._room or len(answer) > target_length:
            self.cut += 1
            source = source[: self._room]
            answer = answer[:target_length]
        read: list[tuple[int, int | float]] = [*enumerate(answer)]
        return source, [self._boundaries.pad, *answer[:-1]], read
