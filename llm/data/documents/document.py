"""What goes through the stages of preparation: documents with their origin, and the verdicts of rules on them."""

import dataclasses
import urllib.parse
from collections.abc import Mapping
from typing import Any

from llm.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What one rule says of one document.

    Attributes:
        rule: its name, unique in a chain.
        keep: whether the document may stay, as far as this rule goes.
        value: the figure that the rule judged by; None where there is none.
    """

    rule: str
    keep: bool
    value: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """A text and where it is from. Stages return changed copies.

    Attributes:
        id: unique in a run, and the same however files are cut into shards where the source has ids of its own.
        text: valid Unicode without lone surrogates; empty until `markup` has been extracted.
        source: name of the source that it was read from.
        url, domain: of the page; the domain is in lower case, without port.
        date: when it was fetched or published, in ISO 8601 as far as the source says.
        licence: SPDX identifier where it is known.
        language, language_confidence: BCP 47 code and a probability, once a stage has found them.
        markup: HTML that no stage has extracted yet.
        metadata: other fields of the source, as JSON takes them.
        verdicts: of all rules so far, in the order of the chain.
    """

    id: str
    text: str
    source: str
    url: str | None = None
    domain: str | None = None
    date: str | None = None
    licence: str | None = None
    language: str | None = None
    language_confidence: float | None = None
    markup: str | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    verdicts: tuple[Verdict, ...] = ()

    @property
    def removed_by(self) -> str | None:
        """The first rule that did not let the document stay."""
        return next((verdict.rule for verdict in self.verdicts if not verdict.keep), None)

    def judged(self, *verdicts: Verdict, **changes: Any) -> 'Document':
        """With further verdicts, and other fields changed."""
        return dataclasses.replace(self, verdicts=(*self.verdicts, *verdicts), **changes)


@dataclasses.dataclass(frozen=True, slots=True)
class Quarantined:
    """A record that could not be made into a document, or on which a stage failed.

    Attributes:
        where: file, and record in it.
        reason: what went wrong, in one line.
        id: of the document, if it had come that far.
        stage: which failed; None for the reader.
    """

    where: str
    reason: str
    id: str | None = None
    stage: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Ignored:
    """A record that holds no document by its nature, as a request or an image in a web archive; counted by reason."""

    reason: str


def not_installed(error: ImportError) -> UserError:
    """The error for a package that is missing, which is the fault of no document."""
    return UserError(
        f'the package {error.name or error} is not installed', fix="pip install 'llm-jax[documents]' brings it."
    )


def domain_of(url: str | None) -> str | None:
    """Host name of a URL in lower case, None where it has none."""
    if not url:
        return None
    try:
        return urllib.parse.urlsplit(url).hostname
    except ValueError:  # as of an unclosed IPv6 address
        return None


def valid_text(text: str) -> tuple[str, bool]:
    """(text that UTF-8 can encode, whether it was changed): pairs of surrogates joined, lone ones made U+FFFD."""
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError:
        return text.encode('utf-16-le', 'surrogatepass').decode('utf-16-le', 'replace'), True
    return text, False
