"""Step `pii`: personal data that is found in generated texts, and the speed on real ones."""

import argparse
from collections.abc import Callable
from typing import Any

from llm.data.documents.document import Document
from llm.data.documents.privacy import KINDS, PersonalData
from tests.data.documents.personal_texts import precision_and_recall
from tools.benchmarks.data.measuring import in_turns, load, read_texts


def pii(arguments: argparse.Namespace) -> None:
    """Print the table of `pii`."""
    from datatrove import data
    from datatrove.pipeline.formatters import PIIFormatter

    stage, other = PersonalData(), PIIFormatter()
    print(f'{"kind":10} {"precision":>9} {"recall":>9}    of exact spans, in 2,000 generated texts a kind')
    for kind in KINDS:
        # Another seed than the tests'.
        precision, recall = precision_and_recall(stage.find, kind, count=2000, seed=1)
        print(f'{kind:10} {precision:9.3f} {recall:9.3f}')
    texts = read_texts(arguments.files, arguments.megabytes)
    documents = [Document(str(i), text, 'benchmark') for i, text in enumerate(texts)]
    runs: dict[str, Callable[[], Any]] = {
        'ours': lambda: stage(documents),
        'ours, as datatrove': lambda: PersonalData(kinds=('email', 'ip'))(documents),
        'datatrove': lambda: [other.format(data.Document(text=text, id='').text) for text in texts],
    }
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f'{len(texts):,} documents, {megabytes:.1f} MB, {arguments.rounds} rounds, {load()}')
    for name, speed in in_turns(runs, megabytes, arguments.rounds)[1].items():
        print(f'{name:20} {speed:8.2f} MB/s')
