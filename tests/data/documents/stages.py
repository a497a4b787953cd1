"""Stages for tests, which workers import: they die, hang or fail at documents that say so."""

import dataclasses
import os
import signal
import time
from collections.abc import Sequence

from llm.data.documents.document import Document, Verdict


@dataclasses.dataclass(frozen=True)
class Poisoned:
    """What a document's text orders happens, and two of a crowd kill together; of others, those with an odd number of
    letters are removed."""

    seconds: float = 0.0
    name = 'poisoned'
    rules = ('odd',)

    def __call__(self, documents: Sequence[Document]) -> list[Document]:
        results = []
        if sum(document.text == 'crowd' for document in documents) > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        for document in documents:
            if document.text == 'kill':
                os.kill(os.getpid(), signal.SIGKILL)
            if document.text == 'exit':
                os._exit(7)
            if document.text == 'hang':
                time.sleep(1000)
            if document.text == 'fail':
                raise ValueError('as told')
            time.sleep(self.seconds)
            even = len(document.text) % 2 == 0
            results.append(document.judged(Verdict('odd', even, len(document.text))))
        return results
