"""Sources of documents. `documents` says what a source is; `text_files` and `standard_library` are sources."""

from llm.data.sources.documents import (
    BadRecord,
    ReadCounts,
    Shard,
    Source,
    Split,
    check_names,
    empty_split_error,
    read_documents,
)
from llm.data.sources.standard_library import StandardLibrary
from llm.data.sources.text_files import TextFiles

__all__ = [
    'BadRecord',
    'ReadCounts',
    'Shard',
    'Source',
    'Split',
    'StandardLibrary',
    'TextFiles',
    'check_names',
    'empty_split_error',
    'read_documents',
]
