"""The model that the convert job starts from, opened from any format: its headers are checked, its tensors not read."""

import dataclasses
from pathlib import Path

from llm.data.vocabularies import Vocabulary, load_vocabulary, read_chat_templates
from llm.errors import UserError
from llm.interop import llama2c
from llm.interop.gguf.files import open_gguf
from llm.interop.huggingface.directory import SETTINGS, open_directory
from llm.interop.huggingface.sentence_transformers import read_pooling
from llm.jobs.trained_model import VOCABULARY, read_run
from llm.models.decoder import ComputeType
from llm.models.low_rank import ReadPiece, merging_reader
from llm.models.model import ModelConfig
from llm.models.parameters import named_specs, parameter_specs
from llm.models.pooling import PoolingConfig
from llm.training.checkpoints import StoredParameters


@dataclasses.dataclass(frozen=True)
class SourceModel:
    """A model to convert.

    Attributes:
        config, sequence_length, vocabulary: of the model, None where its files have none.
        dtypes: of its parameters by name.
        read: a slice of a parameter, in its own dtype.
        chat_template: a Jinja template.
        pooling: how the states of its tokens become one vector of a text, if its files say so.
    """

    config: ModelConfig
    sequence_length: int | None
    vocabulary: Vocabulary | None
    dtypes: dict[str, str]
    read: ReadPiece
    chat_template: str | None = None
    pooling: PoolingConfig | None = None


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """How a model is opened: see Convert for the names that it has, too.

    Attributes:
        merges_adapters: whether low-rank adapters of a run become part of what they are for.
    """

    vocabulary: str | None = None
    checkpoint_step: int | None = None
    ignored_settings: tuple[str, ...] = ()
    compute_dtype: ComputeType = 'float32'
    merges_adapters: bool = False


def open_model(source: Path, options: SourceOptions) -> SourceModel:
    """The model of a run, a Hugging Face directory, a .gguf file or a .bin file of llama2.c.

    Raises:
        UserError: it is none of them, is damaged, or its parts do not fit together.
    """
    if (source / 'config.gin').is_file():
        model = _open_run(source, options)
    elif (source / SETTINGS).is_file():
        model = _open_hugging_face(source, options)
    elif source.suffix == '.gguf':
        model = _open_gguf(source, options)
    elif source.suffix == '.bin':
        model = _open_llama2c(source, options)
    else:
        raise UserError(
            f'this is neither a run directory (config.gin) nor a Hugging Face directory ({SETTINGS}), nor a .gguf '
            'file or a .bin file of llama2.c',
            where=str(source),
            fix='Check the path.',
        )
    if model.vocabulary is not None and model.vocabulary.size > model.config.vocab_size:
        raise UserError(
            f'the vocabulary has {model.vocabulary.size} tokens and the model {model.config.vocab_size}',
            where=str(source),
            fix='Give the vocabulary that the model was trained with: Convert.vocabulary.',
        )
    return model


def _open_run(source: Path, options: SourceOptions) -> SourceModel:
    config, sequence_length, pooling = read_run(source)
    stored = StoredParameters(source, options.checkpoint_step)
    specs = dict(named_specs(parameter_specs(config.build())))
    if {name: spec.shape for name, spec in specs.items()} != {n: shape for n, (_, shape) in stored.arrays.items()}:
        raise UserError(
            f'the parameters of step {stored.step} are not those of its config',
            where=str(source),
            fix='Bring back the config.gin that the run was started with.',
        )
    vocabulary = None
    if options.vocabulary is not None or (source / VOCABULARY).exists():
        vocabulary = load_vocabulary(options.vocabulary or source / VOCABULARY)
    dtypes = {name: dtype for name, (dtype, _) in stored.arrays.items()}
    read: ReadPiece = stored.read
    if options.merges_adapters and config.low_rank is not None:
        # Other programs know nothing of adapters.
        read = merging_reader(read, specs, config.low_rank)
        config = dataclasses.replace(config, low_rank=None)
        plain = [name for name, _ in named_specs(parameter_specs(config.build()))]
        dtypes = {name: dtypes.get(name) or dtypes[f'{name}/base'] for name in plain}
    template = _chat_template(source / VOCABULARY)
    return SourceModel(config, sequence_length, vocabulary, dtypes, read, template, pooling)


def _open_hugging_face(source: Path, options: SourceOptions) -> SourceModel:
    checkpoint = open_directory(source, options.ignored_settings)
    config = dataclasses.replace(checkpoint.config, compute_dtype=options.compute_dtype)
    try:
        vocabulary = load_vocabulary(options.vocabulary or source)
    except UserError:
        # Of a vocabulary that was asked for, or is there and damaged, one wants to hear.
        if options.vocabulary is not None or any(source.glob('*tokenizer*')) or any(source.glob('vocab*')):
            raise
        vocabulary = None

    pieces = checkpoint.pieces
    template = _chat_template(source)
    pooling, most = read_pooling(source)
    length = checkpoint.sequence_length if most is None else min(most, checkpoint.sequence_length or most)
    return SourceModel(config, length, vocabulary, pieces.dtypes, pieces.read, template, pooling)


def _open_gguf(source: Path, options: SourceOptions) -> SourceModel:
    found = open_gguf(source)
    vocabulary = found.read_vocabulary() if options.vocabulary is None else load_vocabulary(options.vocabulary)
    config = dataclasses.replace(found.config, compute_dtype=options.compute_dtype)
    pieces = found.pieces
    return SourceModel(config, found.sequence_length, vocabulary, pieces.dtypes, pieces.read, found.chat_template)


def _open_llama2c(source: Path, options: SourceOptions) -> SourceModel:
    found = llama2c.open_model(source)
    vocabulary: Vocabulary | None = None
    if options.vocabulary is not None and options.vocabulary.endswith('.bin'):
        vocabulary = llama2c.read_tokenizer(options.vocabulary, found.config.vocab_size)
    elif options.vocabulary is not None:
        vocabulary = load_vocabulary(options.vocabulary)
    config = dataclasses.replace(found.config, compute_dtype=options.compute_dtype)
    return SourceModel(config, found.sequence_length, vocabulary, found.pieces.dtypes, found.pieces.read)


def _chat_template(directory: Path) -> str | None:
    return read_chat_templates(directory).get('default')
