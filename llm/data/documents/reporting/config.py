"""How large a report on prepared documents is."""

import dataclasses
import importlib.util

from llm.data.documents.document import not_installed
from llm.data.vocabularies import load_vocabulary
from llm.errors import UserError


@dataclasses.dataclass(frozen=True)
class DataReport:
    """What `report.json` and `report.html` show. Time, memory and the page are bounded, however large the ledger is.

    Args:
        documents: of the ledger that are read at most; of a larger one whole files of each source, chosen by a hash.
        vocabulary: path, as `load_vocabulary` takes it, for the analysis of tokens; None takes that of a `TokenCount`
            among the stages, and without one leaves the analysis out.
        samples: documents shown for each rule and kind: removed, removed and kept next to the bound.
        names: rows of the tables of domains, URLs, languages, licences; also the domains and sources with samples.
        duplicates: groups of duplicates shown side by side.
        token_bytes: text of each source that tokens are analysed on.
        clusters: groups of alike documents that are sought; 0 leaves them out.
        cluster_documents: of a sample by a hash of ids, that they are sought among.
        points: of these, drawn in the map.
        seed: of samples.
    """

    documents: int = 20_000_000
    vocabulary: str | None = None
    samples: int = 3
    names: int = 30
    duplicates: int = 6
    token_bytes: int = 1_000_000
    clusters: int = 16
    cluster_documents: int = 5_000
    points: int = 600
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ('samples', 'names', 'duplicates', 'clusters'):
            if not 0 <= getattr(self, name) <= 200:
                raise UserError(f'{name} = {getattr(self, name)} is not from 0 to 200', where='DataReport')
        if not 1 <= self.cluster_documents <= 100_000 or not 1 <= self.points <= 2_000:
            raise UserError(
                f'cluster_documents = {self.cluster_documents} and points = {self.points} are not within 1 to 100,000 '
                'and 1 to 2,000',
                where='DataReport',
            )
        for name in ('documents', 'token_bytes'):
            if getattr(self, name) < 1:
                raise UserError(f'{name} = {getattr(self, name)} is not positive', where='DataReport')

    def check(self) -> None:
        """What would stop the report at the end of a long run stops it before.

        Raises:
            UserError: a package is not installed, or the vocabulary cannot be read.
        """
        if self.clusters and importlib.util.find_spec('sklearn') is None:
            raise not_installed(ImportError(name='scikit-learn'))
        if self.vocabulary is not None:
            load_vocabulary(self.vocabulary)
