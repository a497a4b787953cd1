"""Linear classifiers of documents on real texts: how well they tell classes apart and how fast, beside others.

    python -m tools.benchmarks.classifiers [TASK ...] [--seeds=5]

Texts are those of LLM_DEV_DATA. Tasks:

quality: Wikipedia articles, news and books against 57 English web pages, in passages of 1,000 characters.
harm: answers of an assistant that people rejected against those that they chose (HH, harmless).
bias: sentences of CrowS-Pairs, the more against the less stereotyping one of each pair.
sentiment: SST-2, its own division into training and test sentences.

The others are fastText (`pip install fasttext-wheel`; n-grams of up to 2 words, 25 epochs, else as it comes) and
scikit-learn's SGDClassifier on its HashingVectorizer. All learn from the same texts and are measured on the same ones:
mean of ROC AUC over seeds, which draw other held-out texts, and its range. Speed is MB of UTF-8 a second of the
process's own time, of training with reading, compiling and all epochs. fastText is left out where it is missing.
"""

import argparse
import csv
import gzip
import importlib.util
import io
import json
import os
import random
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import SGDClassifier
from sklearn.metrics import roc_auc_score

from llm.data.documents.classification.examples import HELD_OUT, Examples, passages, read_examples, split_of
from llm.data.documents.classification.features import NgramFeatures
from llm.data.documents.document import Document
from llm.data.documents.extraction import Extraction
from llm.data.documents.language import Language
from llm.data.documents.sources.records import JsonLines
from llm.data.documents.sources.web_archives import Warc
from llm.data.documents.stage import Chain
from llm.data.sources import TextFiles, read_documents
from llm.training.classifier_fitting import train
from llm.training.linear_classifier import LinearTraining

LABELS = ('positive', 'negative')
_BATCH = 512
# Groups of (text, whether positive) of documents; those held out are given, or drawn by hash, a group as a whole.
Group = list[tuple[str, bool]]
Task = tuple[list[Group], list[Group] | None]


def _folder() -> Path:
    return Path(os.environ.get('LLM_DEV_DATA', '../shared/data'))


def _lines(name: str) -> list[str]:
    with gzip.open(_folder() / name, 'rt', encoding='utf-8') as file:
        return file.read().split('\n')


def _records(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _lines(name) if line]


def _web_pages() -> list[str]:
    source = Warc(name='web', files=str(_folder() / 'web/warc/*.warc.gz'))
    documents = [item for shard in source.shards() for item in shard.read() if isinstance(item, Document)]
    judged = Language(languages=('en',))(Extraction()(documents))
    return [document.text for document in judged if document.removed_by is None]


def _best_third() -> list[str]:
    return [row['text'] for part in ('0091', '0174') for row in _records(f'web/cc_en_head-{part}.jsonl.gz')]


def _wikipedia() -> list[str]:
    text = '\n'.join('\n'.join(_lines(f'text/wikitext2_{part}.txt.gz')) for part in ('valid', 'test'))
    for mark, plain in (('<unk>', ''), (' @-@ ', '-'), (' @,@ ', ','), (' @.@ ', '.')):
        text = text.replace(mark, plain)
    return [article for article in re.split(r'\n (?== [^=])', text) if len(article) > 500]


def quality() -> Task:
    """See the module."""
    books = TextFiles(str(_folder() / 'text/classic_books.jsonl.zst'), validation_fraction=0)
    good = [book[20_000:40_000] for book in read_documents(books, 'train')]
    good += _wikipedia() + [line.partition(' ')[2] for line in _lines('dedup/articles_1000.txt.gz')[:100]]
    return [[(text, True)] for text in good] + [[(text, False)] for text in _web_pages() + _best_third()], None


def harm() -> Task:
    """The last answers of both dialogues; positive is what people rejected."""
    rows = _records('posttraining/hh_harmless_pairs.jsonl.gz')
    last = [[row[kind].rpartition('\n\nAssistant:')[2] for kind in ('rejected', 'chosen')] for row in rows]
    return [[(text, kind == 0) for kind, text in enumerate(pair) if text.strip()] for pair in last], None


def bias() -> Task:
    """See the module."""
    rows = list(csv.DictReader(io.StringIO('\n'.join(_lines('eval/crows_pairs.csv.gz')))))
    return [[(row[kind], kind == 'sent_more') for kind in ('sent_more', 'sent_less')] for row in rows], None


def sentiment() -> Task:
    """See the module."""
    parts = []
    for name in ('train', 'test'):
        rows = [line.rpartition('\t') for line in _lines(f'eval/sst2/{name}.tsv.gz')[1:] if line]
        parts.append([[(text, label == '1')] for text, _, label in rows])
    return parts[0], parts[1]


TASKS: dict[str, tuple[Callable[[], Task], int]] = {
    'quality': (quality, 1000),
    'harm': (harm, 0),
    'bias': (bias, 0),
    'sentiment': (sentiment, 0),
}


def _divided(task: Task, characters: int, seed: int) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Passages to learn from, in an order of the seed, and held-out ones."""
    groups, held_out = task
    if held_out is None:
        parts: tuple[list[Group], list[Group]] = ([], [])
        for group in groups:
            parts[bool(group) and split_of(group[0][0], 0.3, 0.0, seed) == HELD_OUT].append(group)
        groups, held_out = parts
    cut = [
        [(part, holds) for group in some for text, holds in group for part in passages(text, characters)]
        for some in (groups, held_out)
    ]
    random.Random(seed).shuffle(cut[0])
    return cut[0], cut[1]


def _megabytes(rows: list[tuple[str, bool]]) -> float:
    return sum(len(text.encode()) for text, _ in rows) / 1e6


Scorer = Callable[[list[str]], np.ndarray]


def _ours(rows: list[tuple[str, bool]], seed: int, folder: Path, **settings: Any) -> Scorer:
    path = folder / 'rows.jsonl'
    path.write_text(''.join(json.dumps({'text': text, 'label': LABELS[not holds]}) + '\n' for text, holds in rows))
    features = NgramFeatures()
    source = JsonLines(name='rows', files=str(path))
    files = read_examples(
        [Examples(source, label_field='label')],
        Chain(()),
        features,
        LABELS,
        folder / 'examples',
        exclusive=True,
        held_out=0.0,
        validation=0.1 if settings['solver'] == 'adam' else 0.0,
        seed=seed + 1_000_000,  # with the seed that drew what is held out, no first text of a group would be drawn
    )
    model, _, _ = train(files, features, LinearTraining(seed=seed, **settings), LABELS, exclusive=True)
    return lambda texts: np.nan_to_num(model.probabilities(texts)[:, 0], nan=0.5)


def _sgd(rows: list[tuple[str, bool]], seed: int, folder: Path) -> Scorer:
    vectorizer = HashingVectorizer(ngram_range=(1, 2), alternate_sign=False)
    model = SGDClassifier(loss='log_loss', alpha=1e-6, class_weight='balanced', random_state=seed)
    model.fit(vectorizer.transform([text for text, _ in rows]), [holds for _, holds in rows])
    return lambda texts: np.asarray(model.decision_function(vectorizer.transform(texts)))


def _fasttext(rows: list[tuple[str, bool]], seed: int, folder: Path) -> Scorer:
    """Texts are lower-cased and only letters and digits kept apart, as our words are."""
    import fasttext

    def line(text: str) -> str:
        return ' '.join(re.findall(r'\w+', text.lower()))

    path = folder / 'rows.txt'
    path.write_text(''.join(f'__label__{LABELS[not holds]} {line(text)}\n' for text, holds in rows))
    model = fasttext.train_supervised(str(path), wordNgrams=2, epoch=25, thread=1, seed=seed, verbose=0)

    def score(texts: list[str]) -> np.ndarray:
        found = [model.f.predict(f'{line(text)}\n', 2, 0.0, 'strict') for text in texts]
        return np.array([next((p for p, label in row if label == '__label__positive'), 0.5) for row in found])

    return score


def main() -> None:
    """Print a line for each task and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('tasks', nargs='*', metavar='TASK', help=', '.join(TASKS))
    parser.add_argument('--seeds', type=int, default=5)
    arguments = parser.parse_args()
    methods: dict[str, Callable[[list[tuple[str, bool]], int, Path], Scorer]] = {
        'llm adam': lambda rows, seed, folder: _ours(rows, seed, folder, solver='adam'),
        'llm lbfgs': lambda rows, seed, folder: _ours(rows, seed, folder, solver='lbfgs'),
        'scikit-learn SGD': _sgd,
    }
    if importlib.util.find_spec('fasttext') is not None:
        methods['fastText'] = _fasttext
    print(
        f'{"task":10}{"method":18}{"train":>8}{"test":>7}{"AUC":>8}  {"range":15}'
        f'{"training MB/s":>14}{"scoring MB/s":>14}'
    )
    for name in arguments.tasks or list(TASKS):
        make, characters = TASKS[name]
        task = make()
        for method, learn in methods.items():
            areas, training, scoring = [], [], []
            for seed in range(arguments.seeds):
                rows, held_out = _divided(task, characters, seed)
                with tempfile.TemporaryDirectory() as folder:
                    clock = time.process_time()
                    score = learn(rows, seed, Path(folder))
                    training.append(_megabytes(rows) / (time.process_time() - clock))
                texts = [text for text, _ in held_out]
                clock = time.process_time()
                scores = np.concatenate([score(texts[i : i + _BATCH]) for i in range(0, len(texts), _BATCH)])
                scoring.append(_megabytes(held_out) / (time.process_time() - clock))
                areas.append(float(roc_auc_score([holds for _, holds in held_out], scores)))
            spread = f'{min(areas):.4f}-{max(areas):.4f}'
            speeds = f'{np.median(training):>14.2f}{np.median(scoring):>14.1f}'
            print(
                f'{name:10}{method:18}{len(rows):>8,}{len(held_out):>7,}{np.mean(areas):>8.4f}  {spread:15}{speeds}',
                flush=True,
            )


if __name__ == '__main__':
    main()
