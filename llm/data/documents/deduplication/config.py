"""What deduplication does: its rules, in the order in which documents go through them."""

import dataclasses
from typing import Literal

from llm.data.documents.deduplication.corpus import Rule
from llm.data.documents.deduplication.near_duplicates import NearDuplicates
from llm.data.documents.deduplication.repeats import Repeats
from llm.errors import UserError

# Rules that compare documents as wholes, in their order, and the one after them.
EXACT, NEAR = ('id', 'url', 'document'), 'near_duplicate'


@dataclasses.dataclass(frozen=True)
class Deduplication:
    """Removes documents of which there is a better one, and passages that are repeated.

    Rules work one after the other, each on what those before it left: ids, urls, documents, near, then repeats.

    Args:
        sources: preferred ones first; of equal documents, the one from the first of these stays.
        prefer: then which stays: 'longest', 'shortest', 'oldest' or 'newest', in turn; the smallest id breaks ties.
        ids: 'source' lets an id come up once in its source, if it is more than digits (which files often count anew);
            'all' each id once in all sources together; None any.
        urls: whether a URL may, normalised; what names no host is none.
        documents: 'words' lets each sequence of normalised words come up once, 'text' each text; None any.
        near: near duplicates; None leaves them.
        repeats: lines, paragraphs and passages.
        earlier: folders deduplication/ of earlier runs, whose documents are preferred and not written again.
        memory_bytes: records that are held at a time, in each process.
    """

    sources: tuple[str, ...] = ()
    prefer: tuple[Rule, ...] = ('longest',)
    ids: Literal['source', 'all'] | None = 'source'
    urls: bool = True
    documents: Literal['words', 'text'] | None = 'words'
    near: NearDuplicates | None = NearDuplicates()
    repeats: tuple[Repeats, ...] = ()
    earlier: tuple[str, ...] = ()
    memory_bytes: int = 1 << 28

    def __post_init__(self) -> None:
        if self.memory_bytes < 1:
            raise UserError(f'memory_bytes = {self.memory_bytes} is not positive', where='Deduplication')
        units = [some.unit for some in self.repeats]
        if len(set(units)) < len(units):
            raise UserError('repeats have one unit twice', where='Deduplication', fix='Give each unit once.')

    @property
    def rules(self) -> tuple[str, ...]:
        """Those that remove documents, in order."""
        wanted = {'id': self.ids, 'url': self.urls, 'document': self.documents, NEAR: self.near}
        return (*(rule for rule, on in wanted.items() if on), *(some.unit for some in self.repeats))


# Where there is decontamination alone.
NOTHING = Deduplication(prefer=(), ids=None, urls=False, documents=None, near=None)
