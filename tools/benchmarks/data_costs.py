"""Measures what the steps of preparing documents cost, for tools/data_cost_model.py, and holds its model against runs.

    python -m tools.benchmarks.data_costs [--to=docs/data_rates.json]

Seconds of the process's own time, and bytes, of each step on LLM_DEV_DATA, one core; then whole runs on other data than
the rates are from, against what the model says of them. Elements and bytes of every shuffle are those that Beam's own
metrics count; all of it takes some minutes.
"""

import argparse
import dataclasses
import functools
import gc
import json
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm.data.documents.beam import Beam, components, deduplicating, finishing, preparing, repeating, scanning
from llm.data.documents.beam.running import new_pipeline
from llm.data.documents.deduplication import pipeline as local_pipeline
from llm.data.documents.deduplication.config import Deduplication
from llm.data.documents.deduplication.repeats import Repeats
from llm.data.documents.document import Document
from llm.data.documents.extraction import Extraction
from llm.data.documents.language import Language
from llm.data.documents.normalization import Normalization
from llm.data.documents.quality.rules import Rules
from llm.data.documents.runner import run
from llm.data.documents.shard_processing import Task, shard_digest
from llm.data.documents.sources import JsonLines, Source, Warc
from llm.data.documents.stage import Chain, Stage
from tools.benchmarks.data.measuring import read_texts
from tools.data_cost_model import RATES, pipeline_model, prepare_model

CORPUS = Deduplication(repeats=(Repeats('passages'),))
# Shuffles by the number that their size goes with; what is not named goes with documents.
_DRIVERS = {
    'buckets/': 'bands',
    'each pair/': 'pairs',
    'each end/': 'pairs',
    'files to read': 'pairs',
    'meet second/': 'pairs',
    'join/': 'pairs',
    'both ways': 'edges',
    'neighbourhoods': 'edges',
    'each of large': 'edges',
    'smaller ones': 'edges',
    'each of small': 'edges',
    'follow': 'edges',
    'passages/ranges': 'words',
    'passages/equal/': 'repeated',
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """A Beam pipeline: seconds of CPU time, and (elements, bytes) that each of its shuffles moved."""

    seconds: float
    shuffles: dict[str, tuple[int, int]]

    def by_driver(self) -> dict[str, tuple[int, int]]:
        """Elements and bytes of the shuffles that grow with one number."""
        sums: dict[str, tuple[int, int]] = {}
        for name, (elements, size) in self.shuffles.items():
            driver = next((driver for prefix, driver in _DRIVERS.items() if name.startswith(prefix)), 'documents')
            before = sums.get(driver, (0, 0))
            sums[driver] = before[0] + elements, before[1] + size
        return sums


def seconds(work: Callable[[], Any], least: float = 1.0) -> float:
    """CPU time of one call, of as many as take `least` seconds; the first is not counted."""
    work()
    gc.collect()
    started, calls = time.process_time(), 0
    while calls == 0 or time.process_time() - started < least:
        work()
        calls += 1
    return (time.process_time() - started) / calls


def once(work: Callable[[], Any]) -> float:
    """CPU time of one call."""
    gc.collect()
    started = time.process_time()
    work()
    return time.process_time() - started


def shuffled(add: Callable[[Any], None]) -> Measured:
    """Runs a pipeline in this process; what its shuffles moved is what Beam's metrics say of their inputs."""
    from apache_beam.metrics.monitoring_infos import extract_counter_value, extract_distribution

    gc.collect()
    started = time.process_time()
    pipeline = new_pipeline(('--runner=DirectRunner',))
    add(pipeline)
    result = pipeline.run()
    result.wait_until_finish()
    spent = time.process_time() - started
    elements: dict[str, int] = {}
    means: dict[str, float] = {}
    for info in result.monitoring_infos():
        name = info.labels.get('PCOLLECTION')
        if name and info.urn == 'beam:metric:element_count:v1':
            elements[name] = extract_counter_value(info)
        elif name and info.urn == 'beam:metric:sampled_byte_size:v1':
            count, total, *_ = extract_distribution(info)
            means[name] = total / max(count, 1)
    shuffles = {}
    for transform in pipeline.to_runner_api().components.transforms.values():
        if transform.spec.urn == 'beam:transform:group_by_key:v1':
            (name,) = transform.inputs.values()
            count = elements.get(name, 0)
            shuffles[transform.unique_name] = count, round(count * means.get(name, 0.0))
    return Measured(spent, shuffles)


def prepared(sources: Sequence[Source], chain: Chain, output: Path) -> Measured:
    """The first pipeline."""
    shards = [shard for source in sources for shard in source.shards()]
    digested = [Task(shard, i, shard_digest(shard, '')) for i, shard in enumerate(shards)]
    tasks = preparing.write_tasks(digested, str(output / 'tasks'))
    add = functools.partial(
        preparing.documents,
        tasks=tasks,
        chain=chain,
        output=str(output),
        spread_bytes=1 << 30,
        piece_documents=4096,
        seconds_per_batch=600.0,
    )
    return shuffled(add)


def archive_rates(path: Path) -> dict[str, float]:
    """Bytes and seconds of one web archive, step by step."""
    import gzip

    source = Warc(files=str(path), name='web')
    (shard,) = source.shards()
    pages = [item for item in shard.read() if isinstance(item, Document)]
    raw = len(gzip.decompress(path.read_bytes()))
    extract = Extraction()
    texts = extract(pages)
    stages: dict[str, Stage] = {
        'normalization': Normalization(),
        'language': Language(languages=('en',)),
        'rules': rules(),
    }
    found: dict[str, float] = {
        'compressed': path.stat().st_size,
        'raw': raw,
        'markup': sum(len((page.markup or '').encode()) for page in pages),
        'text': _size(texts),
        'documents': len(pages),
        'read': seconds(lambda: list(shard.read())),
        'extraction': seconds(lambda: extract(pages)),
    }
    for name, stage in stages.items():
        found[name] = seconds(functools.partial(stage, texts))
        texts = stage(texts)
    kept = [text for text in texts if text.removed_by is None]
    return found | {'kept': len(kept), 'kept_text': _size(kept)} | _written(shard, texts)


def rules() -> Rules:
    """Those of gin_configs/documents/fineweb_rules.gin."""
    from llm.data.documents.quality.c4 import C4
    from llm.data.documents.quality.fineweb import FineWebQuality
    from llm.data.documents.quality.gopher_quality import GopherQuality
    from llm.data.documents.quality.gopher_repetition import GopherRepetition

    return Rules((GopherRepetition(), GopherQuality(), C4(punctuated_lines=False), FineWebQuality()))


def _size(documents: list[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)


def _written(shard: Any, texts: list[Document]) -> dict[str, float]:
    """Seconds and bytes of the files."""
    import contextlib

    from llm.data.documents.shard_processing import Writer, part

    chain = Chain((Language(languages=('en',)), rules()))
    with tempfile.TemporaryDirectory() as folder:

        def write(some: list[Document]) -> None:
            with contextlib.ExitStack() as stack:
                writer = Writer(Path(folder), 0, chain.rules, stack)
                for text in some:
                    writer.document(text)
                writer.commit()

        sizes: dict[str, float] = {}
        for name, some in (('empty', []), ('file', texts)):
            write(some)
            for kind in ('documents', 'ledger'):
                sizes[f'{kind}_{name}'] = (Path(folder) / part(0, kind)).stat().st_size
        return {'write': seconds(lambda: write(texts)), **sizes}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Prepared documents in a folder, and the numbers that shuffles go with."""

    folder: Path
    output: str
    text: int

    @classmethod
    def of(cls, texts: list[str], folder: Path) -> 'Corpus':
        """Real texts; each fifth comes again with another word, as pages of a site do; each fourth has a paragraph."""
        same = ' '.join(texts[0].split()[:80])
        texts = [f'{text}\n{same}' if i % 4 == 0 else text for i, text in enumerate(texts)]
        texts = texts + [text.replace(' ', ' changed ', 1) for text in texts[::5]]
        lines = [json.dumps({'id': f'document-{i:032d}', 'text': text}) for i, text in enumerate(texts)]
        folder.mkdir()
        (folder / 'texts.jsonl').write_text('\n'.join(lines))
        source = JsonLines(files=str(folder / 'texts.jsonl'), name='texts')
        Beam().prepare((source,), Chain(()), folder, '')
        return cls(folder, str(folder), sum(len(text.encode()) for text in texts))

    @property
    def paths(self) -> list[str]:
        """Of its documents."""
        return sorted(str(path) for path in (self.folder / 'documents').iterdir())

    def measured(self) -> dict[str, Measured]:
        """Each pipeline of deduplication."""
        work = f'{self.output}/beam'
        shutil.rmtree(f'{work}/lost', ignore_errors=True)
        add = functools.partial(deduplicating.duplicates, output=self.output, work=work, config=CORPUS, salts=256)
        star = functools.partial(components.stars, work=work, turn=0, rounds=3, salts=256)
        last = finishing.Finish(self.output, work, 1, CORPUS, None, '', 256, self.text)
        return {'duplicates': shuffled(add), 'stars': shuffled(star), 'finish': shuffled(last.build)}

    def drivers(self, runs: dict[str, Measured]) -> dict[str, int]:
        """The numbers that the sizes of shuffles go with."""
        import pyarrow.parquet

        def moved(name: str) -> int:
            return sum(
                elements
                for some in runs.values()
                for label, (elements, _) in some.shuffles.items()
                if label.startswith(name)
            )

        edges = sum(pyarrow.parquet.read_metadata(path).num_rows for path in (self.folder / 'beam/edges/0').iterdir())
        rows = sum(pyarrow.parquet.read_metadata(path).num_rows for path in self.paths)
        return {
            'documents': rows,
            'bands': moved('buckets/parts'),
            'pairs': moved('each pair'),
            'edges': edges,
            'words': sum(len(scanning.unit_keys(path, set(), CORPUS.repeats[0])) for path in self.paths),
            'repeated': moved('passages/equal/parts'),
        }

    def functions(self) -> dict[str, float]:
        """Seconds per MB of text of what is done in files."""
        megabytes = self.text / 1e6
        near = CORPUS.near
        assert near is not None
        wanted = [(row, b'') for row in range(1 << 20)]
        return {
            'cards': seconds(lambda: [list(scanning.cards(path, CORPUS)) for path in self.paths]) / megabytes,
            'sets': seconds(lambda: [list(scanning.shingle_sets(path, wanted, near)) for path in self.paths])
            / megabytes,
            'passages': seconds(lambda: _passages(self.paths)) / megabytes,
            'final': once(lambda: _final(self.paths)) / megabytes,
        }


def _passages(paths: list[str]) -> None:
    """Twice reads and hashes all; sorts the hashes."""
    some = CORPUS.repeats[0]
    hashes = repeating.Hashes(some, 256)
    hashes.start_bundle()
    for path in paths:
        list(hashes.process((scanning.file_name(path), (path, set()))))
    for cut in hashes.finish_bundle():
        list(repeating.often((cut.value[0], [cut.value[1]]), some.occurrences))
    for path in paths:
        list(scanning.unit_records(path, set(), some, CORPUS, np.zeros(0, np.uint64)))


def _final(paths: list[str]) -> None:
    import pyarrow.parquet

    from llm.data.documents.deduplication.verdicts import ShardDecisions, write_shard

    with tempfile.TemporaryDirectory() as folder:
        for path in paths:
            rows = pyarrow.parquet.read_metadata(path).num_rows
            nothing = ShardDecisions([None] * rows, {}, {}, {})
            write_shard(Path(path), Path(folder) / 'final', Path(folder) / 'verdicts', nothing, ())


def element_seconds() -> float:
    """Of one element in one shuffle: what a pipeline of more groups of two members takes longer."""
    import apache_beam

    from llm.data.documents.beam.groups import Smallest, Tell

    def add(number: int, pipeline: Any) -> None:
        _ = (
            pipeline
            | apache_beam.Create(range(number))
            | 'members' >> apache_beam.Map(lambda i: (b'%08d' % (i // 2), (b'%090d' % i, None)))
            | 'tell' >> Tell(Smallest(1), 256, least=2)
        )

    small, large = (shuffled(functools.partial(add, number)) for number in (2_000, 42_000))
    moved = [sum(elements for elements, _ in some.shuffles.values()) for some in (small, large)]
    return (large.seconds - small.seconds) / (moved[1] - moved[0])


def measure(target: Path) -> None:
    """Rates of one half of the data, then runs over the other half against the model; all into a JSON file."""
    data = Path(os.environ.get('LLM_DEV_DATA', '../shared/data'))
    texts = read_texts('', 2.4)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        empty = Corpus.of(texts[:2], folder / 'empty').measured()
        nothing = prepared(
            (JsonLines(files=str(folder / 'empty/*.jsonl'), name='texts'),), Chain(()), folder / 'nothing'
        )
        some = Corpus.of(texts[::3], folder / 'rates')
        runs = some.measured()
        drivers = some.drivers(runs)
        per_driver: dict[str, dict[str, list[float]]] = {
            name: {
                driver: [elements / max(drivers[driver], 1), size / max(drivers[driver], 1)]
                for driver, (elements, size) in measured.by_driver().items()
            }
            for name, measured in runs.items()
        }
        rates: dict[str, Any] = {
            'machine': f'{_processor()}, Python {platform.python_version()}',
            'archive': archive_rates(data / 'web/warc/sample-0000.warc.gz'),
            'fixed': {name: measured.seconds for name, measured in {**empty, 'prepare': nothing}.items()},
            'functions': some.functions(),
            'element': element_seconds(),
            'drivers': drivers,
            'collected': repeating.COLLECTED // repeating.HELD.itemsize,
            'range': repeating.RANGE // repeating.HELD.itemsize,
            'text': some.text,
            'shuffles': per_driver,
        }
        other = Corpus.of([text for i, text in enumerate(texts) if i % 3], folder / 'other')
        found = other.measured()
        rates['validation'] = [
            *_compared(rates, other, found),
            *_archives(rates, data / 'web/warc/sample-0001.warc.gz', folder),
        ]
        # What is told of larger runs rests on both.
        second = archive_rates(data / 'web/warc/sample-0001.warc.gz')
        rates['archive'] = {name: value + second[name] for name, value in rates['archive'].items()}
        local = once(lambda: local_pipeline.finish(other.folder, CORPUS, None, processes=1))
        rates['resident_megabytes'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rates['local'] = {'seconds': local, 'beam': sum(some.seconds for some in found.values()), 'text': other.text}
    target.write_text(json.dumps(rates, indent=1) + '\n')
    print(json.dumps(rates['validation'], indent=1))


def _processor() -> str:
    lines = Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else []
    return next((line.partition(': ')[2] for line in lines if line.startswith('model name')), platform.machine())


def _row(what: str, unit: str, model: float, found: float) -> dict[str, Any]:
    return {'what': what, 'unit': unit, 'model': round(model, 3), 'measured': round(found, 3)}


def _compared(rates: dict[str, Any], corpus: Corpus, runs: dict[str, Measured]) -> Iterator[dict[str, Any]]:
    drivers = corpus.drivers(runs)
    for name, measured in runs.items():
        spent, size = pipeline_model(rates, name, drivers, corpus.text)
        yield _row(f'Beam, {name}', 'CPU s', rates['fixed'][name] + spent, measured.seconds)
        yield _row(
            f'Beam, {name}', 'MB shuffled', size / 1e6, sum(size for _, size in measured.shuffles.values()) / 1e6
        )


def _archives(rates: dict[str, Any], path: Path, folder: Path, copies: int = 12) -> Iterator[dict[str, Any]]:
    """Whole runs over copies of another archive than the rates are from."""
    for i in range(copies):
        shutil.copy(path, folder / f'{i:02d}.warc.gz')
    sources = (Warc(files=str(folder / '*.warc.gz'), name='web'),)
    chain = Chain((Extraction(), Normalization(), Language(languages=('en',)), rules()))
    known, other = rates['archive'], archive_rates(path)
    model = prepare_model(known, {name: other[name] for name in ('raw', 'markup', 'text', 'kept_text')}) * copies
    local, beam = folder / 'local', folder / 'beam'
    local.mkdir()
    work = functools.partial(run, sources, chain, local, settings='', processes=1, progress=False)
    yield _row('one machine, prepare', 'CPU s', model, once(work))
    for kind in ('documents', 'ledger'):
        size = sum(file.stat().st_size for file in (local / kind).iterdir()) / 1e6
        per = {'documents': 'kept_text', 'ledger': 'documents'}[kind]
        empty = known[f'{kind}_empty']
        expected = (empty + (known[f'{kind}_file'] - empty) / known[per] * other[per]) * copies / 1e6
        yield _row(f'one machine, {kind}/', 'MB', expected, size)
    yield _row('Beam, prepare', 'CPU s', rates['fixed']['prepare'] + model, prepared(sources, chain, beam).seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--to', type=Path, default=RATES)
    measure(parser.parse_args().to)


if __name__ == '__main__':
    main()
