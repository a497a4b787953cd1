"""Language of documents, and which languages stay."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from llm.data.documents import fasttext_models
from llm.data.documents.bounds import Bounds
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
        languages: codes of the languages to keep, as the model has them ('en'); empty keeps all.
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

    @property
    def bounds(self) -> tuple[Bounds, ...]:
        """Of the confidence; a document in a language that is not wanted goes whatever its confidence."""
        return (
            Bounds(RULE, self.threshold, of=', '.join(self.languages)),
            *(Bounds(RULE, value, of=language) for language, value in self.thresholds),
        )

    def __call__(self, documents: Sequence[Document]) -> list[Document]:
        _check_known(self.model, (*self.languages, *(language for language, _ in self.thresholds)))
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
def _check_known(model: str, languages: tuple[str, ...]) -> None:
    """Raises a UserError for a code that py3langid never gives: it would remove all documents."""
    known = sorted(set(_py3langid().labels)) if model == 'py3langid' else languages
    unknown = [language for language in languages if language not in known]
    if unknown:
        what = f'py3langid knows no language {", ".join(map(repr, unknown))}'
        raise UserError(what, where='Language', fix=f'Give codes of these: {", ".join(known)}')


@functools.cache
def _identifier(model: str) -> Any:
    """text -> (language, confidence)."""
    if model == 'py3langid':
        return lambda text: _as_floats(_py3langid().classify(text))
    return functools.partial(fasttext_models.best, model)


@functools.cache
def _py3langid() -> Any:
    """The model, read once in a process."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _as_floats(found: tuple[str, Any]) -> tuple[str, float]:
    return found[0], float(found[1])
