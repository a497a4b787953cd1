"""Examples for fine-tuning: files of texts with classes, numbers, tags, answers or other texts, as rows of tokens."""

from llm.data.labelled.files import LabelledExample, LabelledFiles, Task, read_labelled
from llm.data.labelled.pairs import PairRows
from llm.data.labelled.rows import LabelledRows, ReadAt, label_names

__all__ = [
    'LabelledExample',
    'LabelledFiles',
    'LabelledRows',
    'PairRows',
    'ReadAt',
    'Task',
    'label_names',
    'read_labelled',
]
