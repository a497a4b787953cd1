"""Language of documents, and which languages stay."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from llm.data.documents.document import Document, Verdict
from llm.data.sources.files import file_identity
from llm.errors import UserError

RULE = 'language'
# Longer texts are judged by their beginning, in characters: more changes nothing and costs time.
_JUDGED = 4_000


@dataclasses.dataclass(frozen=True)
class Language:
    """Finds the language of each document, and keeps those of given languages.

    Args:
        languages: codes of the languages to keep ('en'); empty keeps all.
        threshold: least confidence, from 0 to 1; a document below is removed.
        thresholds: by language, in place of `threshold`: (('de', 0.5), ('th', 0.2)).
        model: 'py3langid' (140 languages), or the path of a fastText model of languages (as lid.176.bin), which needs
            the package fasttext-predict.
    """

    languages: tuple[str, ...] = ()
    threshold: float = 0.65
    thresholds: tuple[tuple[str, float], ...] = ()
    model: str = 'py3langid'

    name = 'language'
    rules = (RULE,)

    def __post_init__(self) -> None:
        for language, value in (('threshold', self.threshold), *self.thresholds):
            if not 0 <= value <= 1:
                raise UserError(f'{language} = {value} is not from 0 to 1', where='Language')

    def __call__(self, documents: Sequence[Document]) -> list[Document]:
        thresholds = dict(self.thresholds)
        return [self._judge(document, thresholds) for document in documents]

    def identities(self) -> list[str]:
        """Change where the content of a model of one's own does."""
        return [] if self.model == 'py3langid' else [file_identity(self.model)]

    def _judge(self, document: Document, thresholds: Mapping[str, float]) -> Document:
        language, confidence = _identifier(self.model)(document.text[:_JUDGED])
        wanted = not self.languages or language in self.languages
        keep = wanted and confidence >= thresholds.get(language, self.threshold)
        return document.judged(Verdict(RULE, keep, confidence), language=language, language_confidence=confidence)


@functools.cache
def _identifier(model: str) -> Any:
    """text -> (language, confidence); read once in a process."""
    if model == 'py3langid':
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        return lambda text: _as_floats(identifier.classify(text))
    return _fasttext(model)


def _as_floats(found: tuple[str, Any]) -> tuple[str, float]:
    return found[0], float(found[1])


def _fasttext(path: str) -> Any:
    try:
        import fasttext
    except ImportError as error:
        raise UserError(
            'a fastText model needs the package fasttext-predict', where='Language.model', fix='Install it.'
        ) from error
    try:
        model = fasttext.load_model(path)
    except ValueError as error:
        raise UserError(
            f'is no fastText model ({error})', where=path, fix='Give the path of lid.176.bin or alike.'
        ) from error

    def identify(text: str) -> tuple[str, float]:
        labels, probabilities = model.predict(text.replace('\n', ' '))
        if not labels:
            return 'und', 0.0
        return labels[0].removeprefix('__label__'), min(1.0, float(probabilities[0]))

    return identify
