"""What the vectors of an embedding are worth, on pairs that it was not trained on."""

import json
from typing import Any

import numpy as np

from llm.data.labelled import PairRows
from llm.evaluation import metrics
from llm.training.trainer import Trainer


class PairScorer:
    """Called with the vectors of the evaluation rows, the figures: of pairs with scores how cosines correlate with
    them, of others how the second text is found among all of them; see llm.evaluation.metrics.

    Attributes:
        num_batches: of the evaluation rows. last: the figures found last.
    """

    def __init__(self, trainer: Trainer, rows: PairRows) -> None:
        self._rows, self.step = rows, trainer.prediction_step
        self.num_batches = -(-rows.num_rows // trainer.step_config.batch_size)
        self.last: dict[str, float] = {}
        self._said: list[dict[str, Any]] = []

    def __call__(self, parameters: Any, found: list[dict[str, np.ndarray]]) -> dict[str, float]:
        """Compare."""
        rows = self._rows
        vectors = np.concatenate([each['predicted'] for each in found])[: rows.num_rows].astype(np.float64)
        if rows.scores is not None:
            said = metrics.cosines(vectors[:, 0], vectors[:, 1]).tolist()
            self.last = metrics.similarity(vectors[:, 0], vectors[:, 1], rows.scores.tolist())
            self._said = [
                {'label': score, 'predicted': cosine} for score, cosine in zip(rows.scores, said, strict=True)
            ]
            return self.last
        # A text that belongs to several others is one document, and hard negatives are among them.
        texts: dict[str, int] = {}
        documents, relevant = [], []
        for example, sides in zip(rows.examples, vectors, strict=True):
            for text, vector in zip(example.texts[1:], sides[1:], strict=True):
                if text not in texts:
                    texts[text] = len(texts)
                    documents.append(vector)
            relevant.append(texts[example.texts[1]])
        ranks = metrics.ranks_of(vectors[:, 0], np.stack(documents), relevant)
        self.last = metrics.retrieval(ranks)
        self._said = [{'rank': rank} for rank in ranks.tolist()]
        return self.last

    def as_json_lines(self) -> str:
        """Of each pair: where it is, its score and its cosine, or the rank of its second text."""
        places = ({'where': example.where} for example in self._rows.examples)
        return ''.join(json.dumps(place | said) + '\n' for place, said in zip(places, self._said, strict=True))
