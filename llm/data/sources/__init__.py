"""Sources of documents. `documents` says what a source is; every other module here is one."""

from llm.data.sources.documents import BadRecord, ReadCounts, Shard, Source, Split, empty_split_error, read_documents

__all__ = ['BadRecord', 'ReadCounts', 'Shard', 'Source', 'Split', 'empty_split_error', 'read_documents']
