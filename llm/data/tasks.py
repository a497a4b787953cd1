"""SeqIO (Roberts et al. 2022): registered tasks and mixtures as our sources, and our sources as SeqIO tasks.

A task declares a data source and preprocessors; what it gives before its `CacheDatasetPlaceholder` is what a cache
holds. `SeqioTask` reads that as text, shard by shard, for the token cache of this project, which tokenises with the
run's own vocabulary. What follows the placeholder is done by `llm.data.objectives`, `packing` and `examples`.

SeqIO and TensorFlow are imported by functions of this module when a task is really read, never before.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from llm.data.objectives import PostCache, record_generator
from llm.data.sources import ReadCounts, Source, Split, StandardLibrary, read_documents
from llm.errors import UserError

if TYPE_CHECKING:
    import seqio
    import tensorflow as tf

# Part of every fingerprint: raise it when a change here changes what is read from the same data.
_READER_VERSION = 1


@dataclasses.dataclass(frozen=True)
class TfdsText:
    """A dataset of TensorFlow Datasets with a text field, and which of its splits are ours ('train[1%:]' works)."""

    name: str  # with version, as SeqIO wants it
    train: str = 'train'
    validation: str = 'validation'
    text_field: str = 'text'


TFDS_TASKS: Mapping[str, TfdsText] = {
    'c4_en': TfdsText('c4/en:3.1.0'),
    'lm1b': TfdsText('lm1b:1.1.0', validation='test'),
    'tiny_shakespeare': TfdsText('tiny_shakespeare:1.0.0'),
    'wikipedia_en': TfdsText('wikipedia/20230601.en:1.0.0', train='train[1%:]', validation='train[:1%]'),
}


def import_seqio() -> Any:
    """The module seqio. TensorFlow is kept off the accelerators, which JAX needs whole."""
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    import seqio
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):  # TensorFlow is already in use, with what it has
        tf.config.set_visible_devices([], 'GPU')
    return seqio


def text_preprocessors(text_field: str = 'text') -> list[Any]:
    """The preprocessors of a language-modelling task: text to targets, tokens, the cache, the end of the document."""
    seqio = import_seqio()
    return [
        _rekey(text_field),
        seqio.preprocessors.tokenize,
        seqio.CacheDatasetPlaceholder(),
        seqio.preprocessors.append_eos_after_trim,
    ]


def _rekey(text_field: str) -> Callable[['tf.data.Dataset'], 'tf.data.Dataset']:
    def rekey(dataset: 'tf.data.Dataset') -> 'tf.data.Dataset':
        return dataset.map(lambda example: {'targets': example[text_field]})

    return rekey


def tfds_task(
    name: str, text: TfdsText, vocabulary: 'seqio.Vocabulary | None' = None, data_directory: str | None = None
) -> 'seqio.Task':
    """A SeqIO task over a TFDS dataset, not registered. Nothing is read or downloaded until it is used.

    Args:
        vocabulary: of the task's own `targets`; bytes by default. The token cache does not use it.
        data_directory: where TFDS keeps prepared data; None is TFDS's default, ~/tensorflow_datasets.
    """
    seqio = import_seqio()
    source = seqio.TfdsDataSource(
        text.name,
        tfds_data_dir=os.path.expanduser(data_directory) if data_directory else None,
        splits={'train': text.train, 'validation': text.validation},
        read_only=True,
    )
    return seqio.Task(
        name,
        source=source,
        output_features=_features(vocabulary),
        preprocessors=text_preprocessors(text.text_field),
    )


def as_seqio_task(
    source: Source,
    name: str,
    vocabulary: 'seqio.Vocabulary | None' = None,
    preprocessors: Sequence[Any] | None = None,
    output_features: 'Mapping[str, seqio.Feature] | None' = None,
) -> 'seqio.Task':
    """One of our sources as a SeqIO task, not registered: examples `{'text': document}` go into `preprocessors`."""
    seqio = import_seqio()
    import tensorflow as tf

    def dataset_fn(split: str, shuffle_files: bool = False, seed: int | None = None) -> 'tf.data.Dataset':
        del shuffle_files, seed  # documents come in the source's order
        return tf.data.Dataset.from_generator(
            lambda: ({'text': text} for text in read_documents(source, cast(Split, split))),
            output_signature={'text': tf.TensorSpec((), tf.string)},
        )

    return seqio.Task(
        name,
        source=seqio.FunctionDataSource(dataset_fn, splits=('train', 'validation')),
        output_features=output_features or _features(vocabulary),
        preprocessors=text_preprocessors() if preprocessors is None else preprocessors,
    )


def register_tasks(vocabulary: 'seqio.Vocabulary | None' = None, data_directory: str | None = None) -> None:
    """Add 'stdlib' and TFDS_TASKS to SeqIO's registry, for use in mixtures by name; those there already are kept."""
    seqio = import_seqio()
    tasks = [tfds_task(name, text, vocabulary, data_directory) for name, text in TFDS_TASKS.items()]
    tasks.append(as_seqio_task(StandardLibrary(), 'stdlib', vocabulary))
    for task in tasks:
        if task.name not in seqio.TaskRegistry.names():
            seqio.TaskRegistry.add_provider(task.name, task)


def as_seqio_preprocessor(
    function: PostCache, seed: int, outputs: Mapping[str, Any]
) -> Callable[['tf.data.Dataset'], 'tf.data.Dataset']:
    """A post-cache function of ours as a SeqIO preprocessor.

    Args:
        function: given each example's features as NumPy arrays, and a generator seeded by (seed, 0, position).
        outputs: NumPy type of each feature that the function gives, all one-dimensional.
    """

    def preprocess(dataset: 'tf.data.Dataset') -> 'tf.data.Dataset':
        import tensorflow as tf

        names = list(dataset.element_spec)

        def call(position: Any, *features: Any) -> list[Any]:
            example = function(dict(zip(names, features, strict=True)), record_generator(seed, 0, int(position)))
            return [np.asarray(example[name], dtype) for name, dtype in outputs.items()]

        def step(position: 'tf.Tensor', example: dict[str, 'tf.Tensor']) -> dict[str, 'tf.Tensor']:
            dtypes = [tf.as_dtype(dtype) for dtype in outputs.values()]
            arrays = tf.numpy_function(call, [position, *(example[name] for name in names)], dtypes)
            return {name: tf.ensure_shape(array, [None]) for name, array in zip(outputs, arrays, strict=True)}

        return dataset.enumerate().map(step)

    return preprocess


@dataclasses.dataclass(frozen=True)
class SeqioTask:
    """A SeqIO task as a source of documents: its text before `CacheDatasetPlaceholder`.

    Args:
        task: a name of TFDS_TASKS, 'stdlib', or of a task that one of `modules` registers.
        data_directory: where TFDS keeps prepared data; None is TFDS's default, ~/tensorflow_datasets.
        tfds_version: another version of a task of TFDS_TASKS, such as '3.0.1' for C4 prepared years ago.
        modules: Python modules to import first, which register tasks.
        feature: the feature that holds the text; if the task has tokenised it, `<feature>_pretokenized` is read.
        train_split, validation_split: the names of the splits in the task.
        revision: raise it to tokenise again after changing the code of a task, which no fingerprint sees.
    """

    task: str
    data_directory: str | None = None
    tfds_version: str | None = None
    modules: tuple[str, ...] = ()
    feature: str = 'targets'
    train_split: str = 'train'
    validation_split: str = 'validation'
    revision: int = 0

    def shards(self, split: Split) -> list['SeqioShard']:
        """One shard a file of the task's source. Raises UserError where the task or its data does not exist."""
        task = self.load()
        name = {'train': self.train_split, 'validation': self.validation_split}[split]
        if name not in task.splits:
            raise UserError(
                f'it has no split {name!r}, only {", ".join(sorted(task.splits))}',
                where=f'SeqIO task {self.task}',
                fix='Set SeqioTask.train_split and validation_split',
            )
        files = list(task.source.list_shards(name))
        identities = [_identity(task.source, name, index, file) for index, file in enumerate(files)]
        return [
            SeqioShard(os.path.basename(file), self, name, index, len(files), identity)
            for index, (file, identity) in enumerate(zip(files, identities, strict=True))
        ]

    def load(self) -> 'seqio.Task':
        """The task. Raises UserError if there is none of that name, or its TFDS data is not there."""
        seqio = import_seqio()
        _import_modules(self.modules)
        if self.task in TFDS_TASKS:
            text = TFDS_TASKS[self.task]
            if self.tfds_version:
                text = dataclasses.replace(text, name=f'{text.name.split(":")[0]}:{self.tfds_version}')
            task = tfds_task(self.task, text, data_directory=self.data_directory)
        else:
            register_tasks(data_directory=self.data_directory)
            task = _registered(seqio.TaskRegistry, self.task, 'task')
            if self.data_directory and isinstance(task.source, seqio.TfdsDataSource):
                task.source.tfds_dataset.override_data_dir(os.path.expanduser(self.data_directory))
        if isinstance(task.source, seqio.TfdsDataSource):
            _check_prepared(self.task, task.source)
        return task


@dataclasses.dataclass(frozen=True)
class SeqioShard:
    """One file of a `SeqioTask`, read for one of the task's splits."""

    name: str
    source: SeqioTask
    split: str
    index: int
    num_shards: int
    identity: str

    def fingerprint(self) -> str:
        """SHA-256 of which file it is (TFDS: version, part, size) and of the settings; not of the task's code."""
        settings = dataclasses.replace(self.source, data_directory=None, modules=())
        content = [_READER_VERSION, self.identity, dataclasses.asdict(settings), self.index, self.num_shards]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def documents(self, counts: ReadCounts) -> Iterator[str]:
        """The file's documents in its order. Raises UserError for a file that cannot be read."""
        import tensorflow as tf

        task = self.source.load()
        try:
            for number, content in enumerate(self._texts(task), start=1):
                text = content.decode(errors='replace')
                if not text or text.isspace():
                    counts.empty += 1
                    continue
                data = text.encode()
                if data != content:
                    counts.add_invalid_utf8(self.name, number, skipped=False)
                counts.add_document(len(data))
                yield text
        except tf.errors.OpError as error:
            raise UserError(
                f'SeqIO task {self.source.task} cannot be read ({error.message.splitlines()[0]})',
                where=self.name,
                fix='Prepare the data again.',
            ) from error

    def _texts(self, task: 'seqio.Task') -> Iterator[bytes]:
        seqio = import_seqio()
        part = seqio.ShardInfo(self.index, self.num_shards) if self.num_shards > 1 else None
        dataset = task.source.get_dataset(split=self.split, shuffle=False, shard_info=part)
        with seqio.map_seed_manager(0):
            for step in _steps_before_cache(task):
                dataset = seqio.add_kwargs_to_transform(
                    step, sequence_length=None, output_features=task.output_features
                )(dataset)
        field = next(
            (
                name
                for name in (self.source.feature, f'{self.source.feature}_pretokenized')
                if name in dataset.element_spec and dataset.element_spec[name].dtype.name == 'string'
            ),
            None,
        )
        if field is None:
            raise UserError(
                f'before its cache it gives {", ".join(dataset.element_spec)}, and no text in {self.source.feature!r}',
                where=f'SeqIO task {self.source.task}',
                fix='Set SeqioTask.feature to the one that holds text',
            )
        yield from dataset.map(lambda example: example[field]).as_numpy_iterator()


def mixture_rates(mixture: str, modules: Sequence[str] = ()) -> list[tuple[str, float]]:
    """(task, rate) of every task in a registered SeqIO mixture, sub-mixtures resolved, in order of names.

    Rates are SeqIO's, per example; here they are per row of the sequence length.
    """
    seqio = import_seqio()
    _import_modules(modules)
    register_tasks()
    found = _registered(seqio.MixtureRegistry, mixture, 'mixture')
    return [(task.name, float(found.get_rate(task))) for task in found.tasks]


def _features(vocabulary: 'seqio.Vocabulary | None') -> 'dict[str, seqio.Feature]':
    seqio = import_seqio()
    return {'targets': seqio.Feature(vocabulary or seqio.ByteVocabulary(), add_eos=True)}


def _steps_before_cache(task: 'seqio.Task') -> list[Any]:
    """The preprocessors up to the cache, without a final tokenisation, whose result would be thrown away."""
    seqio = import_seqio()
    steps = []
    for step in task.preprocessors:
        if isinstance(step, seqio.CacheDatasetPlaceholder):
            break
        steps.append(step)
    else:
        raise UserError(
            'it has no CacheDatasetPlaceholder, which says what is text and what is made of it',
            where=f'SeqIO task {task.name}',
            fix='Put one among its preprocessors.',
        )
    if steps and steps[-1] in (seqio.preprocessors.tokenize, seqio.preprocessors.tokenize_and_append_eos):
        steps.pop()
    return steps


def _identity(source: Any, split: str, index: int, file: str) -> str:
    """What tells a shard's content apart, as far as it can be known without reading it."""
    seqio = import_seqio()
    if isinstance(source, seqio.TfdsDataSource):
        part = source.tfds_dataset.files(split)[index]
        name = source.tfds_dataset.resolved_tfds_name(split)
        return json.dumps([name, os.path.basename(file), part.skip, part.take, _size(file)])
    return json.dumps([file, _size(file), os.stat(file).st_mtime_ns if os.path.exists(file) else None])


def _size(file: str) -> int | None:
    import tensorflow as tf

    return tf.io.gfile.stat(file).length if tf.io.gfile.exists(file) else None


def _check_prepared(task: str, source: Any) -> None:
    name = source.tfds_dataset.name
    try:
        builder = source.tfds_dataset.builder
    except Exception as error:  # TFDS has no common error class: unknown names, versions, unreadable folders
        raise UserError(
            f'TensorFlow Datasets cannot open {name} ({str(error).splitlines()[0]})',
            where=f'SeqIO task {task}',
            fix='Check SeqioTask.tfds_version and data_directory.',
        ) from error
    if not builder.is_prepared():
        folder = builder.data_dir
        root = source.tfds_dataset.data_dir or '~/tensorflow_datasets'
        raise UserError(
            f'the TFDS dataset {name} is not in {folder}',
            where=f'SeqIO task {task}',
            fix=f'Download and prepare it: tfds build {name} --data_dir={root} (C4 and Wikipedia do that with Apache '
            f'Beam), or copy a prepared one there: gsutil -m cp -r gs://tfds-data/datasets/{name.replace(":", "/")} '
            '...; or set SeqioTask.data_directory to where it is.',
        )


def _import_modules(modules: Sequence[str]) -> None:
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(
                f'the module {module!r} cannot be imported ({error})', fix='Check SeqioTask.modules and PYTHONPATH.'
            ) from error


def _registered(registry: Any, name: str, kind: str) -> Any:
    if name not in registry.names():
        near = difflib.get_close_matches(name, registry.names(), n=1)
        raise UserError(
            f'no SeqIO {kind} is called {name!r}',
            fix=f'Did you mean {near[0]!r}?'
            if near
            else f'Name the module that registers it in modules: {kind}s '
            f'known are {", ".join(sorted(registry.names())) or "none"}.',
        )
    return registry.get(name)
