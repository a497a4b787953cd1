"""Where documents come from: one file a format. `files` says what a source of files is."""

from llm.data.documents.sources.files import FileSource, InputShard, Item, Source
from llm.data.documents.sources.records import JsonLines, Parquet
from llm.data.documents.sources.texts import HtmlFiles, PlainTexts
from llm.data.documents.sources.web_archives import Warc

__all__ = ['FileSource', 'HtmlFiles', 'InputShard', 'Item', 'JsonLines', 'Parquet', 'PlainTexts', 'Source', 'Warc']
