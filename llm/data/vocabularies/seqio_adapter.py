"""Our vocabularies for SeqIO's preprocessors. Importing this module does not import SeqIO; calling `as_seqio` does."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

from llm.data.vocabularies.vocabulary import Vocabulary


@functools.cache
def _adapter_class() -> type:
    import numpy as np
    import seqio
    import tensorflow as tf

    class SeqioVocabulary(seqio.Vocabulary):
        """A `Vocabulary` of ours behind SeqIO's interface; its TensorFlow methods call back into Python."""

        def __init__(self, vocabulary: Vocabulary) -> None:
            super().__init__()
            self.vocabulary = vocabulary

        @property
        def pad_id(self) -> int:
            return self.vocabulary.pad_id

        @property
        def bos_id(self) -> int | None:
            return self.vocabulary.bos_id

        @property
        def eos_id(self) -> int | None:
            return self.vocabulary.eos_id

        @property
        def unk_id(self) -> int | None:
            return self.vocabulary.unk_id

        @property
        def _base_vocab_size(self) -> int:
            return self.vocabulary.size

        def _encode(self, s: str) -> Sequence[int]:
            return self.vocabulary.encode(s)

        def _decode(self, ids: Iterable[int]) -> str:
            return self.vocabulary.decode(ids)

        def _encode_tf(self, s: Any) -> Any:
            def encode(text: Any) -> Any:  # bytes, or an array of no dimensions that holds them
                return np.array(self.vocabulary.encode(np.asarray(text).item().decode()), np.int32)

            ids = tf.numpy_function(encode, [s], tf.int32, stateful=False)
            ids.set_shape([None])
            return ids

        def _decode_tf(self, ids: Any) -> Any:
            text = tf.numpy_function(self._decode_rows, [ids], tf.string, stateful=False)
            text.set_shape(ids.shape[:-1])
            return text

        def _decode_rows(self, ids: Any) -> Any:
            rows = [self.vocabulary.decode(row).encode() for row in ids.reshape(-1, ids.shape[-1])]
            return np.array(rows, object).reshape(ids.shape[:-1])

        def __eq__(self, other: object) -> bool:
            return isinstance(other, SeqioVocabulary) and self.vocabulary == other.vocabulary

        def __hash__(self) -> int:
            return hash(self.vocabulary)

        def __reduce__(self) -> tuple[Any, tuple[Vocabulary]]:
            return as_seqio, (self.vocabulary,)

    return SeqioVocabulary


def as_seqio(vocabulary: Vocabulary) -> Any:
    """A seqio.Vocabulary that encodes and decodes as `vocabulary` does."""
    return _adapter_class()(vocabulary)
