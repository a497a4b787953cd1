"""Step `extraction`: main text of web pages against the libraries as they come."""

import argparse
from collections.abc import Callable

from llm.data.documents.document import Document
from llm.data.documents.extraction import Extraction
from tests.data.documents.articles import f1, read_pages
from tools.benchmarks.data.measuring import DEV_DATA, in_turns, load


def extraction(arguments: argparse.Namespace) -> None:
    """Print the table of `extraction`."""
    import trafilatura
    from resiliparse.extract.html2text import extract_plain_text

    pages, truth = read_pages(DEV_DATA)
    stages = {f'ours, {method}': Extraction(method) for method in ('resiliparse', 'trafilatura')}

    def by(stage: Extraction) -> Callable[[], list[str]]:
        documents = [Document(str(i), '', 'benchmark', markup=page) for i, page in enumerate(pages)]
        return lambda: [document.text for document in stage(documents)]

    runs: dict[str, Callable[[], list[str]]] = {name: by(stage) for name, stage in stages.items()}
    runs['resiliparse'] = lambda: [extract_plain_text(page, main_content=True) for page in pages]
    runs['trafilatura'] = lambda: [trafilatura.extract(page) or '' for page in pages]
    megabytes = sum(len(page.encode()) for page in pages) / 1e6
    print(f'{len(pages)} pages, {megabytes:.1f} MB, {arguments.rounds} rounds, {load()}')
    results, speeds = in_turns(runs, megabytes, arguments.rounds)
    for name, speed in speeds.items():
        print(f'{name:20} F1 {f1(results[name], truth):.3f} {speed:8.1f} MB/s')
