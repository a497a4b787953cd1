"""Where documents come from: one file a format. `files` says what a source of files is."""

from llm.data.documents.sources.code import Code
from llm.data.documents.sources.files import FileSource, InputShard, Item, Source
from llm.data.documents.sources.records import JsonLines, Parquet
from llm.data.documents.sources.synthetic import Synthetic
from llm.data.documents.sources.texts import HtmlFiles, PlainTexts
from llm.data.documents.sources.web_archives import Warc
from llm.data.documents.sources.wikipedia import Wikipedia

__all__ = [
    'Code',
    'FileSource',
    'HtmlFiles',
    'InputShard',
    'Item',
    'JsonLines',
    'Parquet',
    'PlainTexts',
    'Source',
    'Synthetic',
    'Warc',
    'Wikipedia',
]
