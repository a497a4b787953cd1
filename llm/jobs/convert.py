"""The convert job: a model of another program into a run directory, and a run's model into other programs' formats.

Nothing is ever whole in memory: a piece is read, turned round, cast and written before the next.
"""

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, cast, get_args

import jax.numpy as jnp
import numpy as np

from llm.configuration import Invocation, render
from llm.data.vocabularies import write_vocabulary
from llm.errors import UserError
from llm.interop import llama2c
from llm.interop.exporting.writing import PLATFORMS, ProgramFormat, check_exportable, write_programs
from llm.interop.gguf.files import GgufType, write_gguf
from llm.interop.huggingface.directory import StoredType, find_family, write_directory
from llm.interop.huggingface.sentence_transformers import write_pooling
from llm.jobs.conversion_source import SourceModel, SourceOptions, open_model
from llm.jobs.trained_model import VOCABULARY
from llm.models.decoder import ComputeType, DecoderConfig
from llm.models.encoder_decoder import EncoderDecoderConfig
from llm.models.model import ModelConfig
from llm.models.parameters import count_parameters, named_specs, parameter_specs
from llm.models.pooling import PoolingConfig
from llm.parallel.processes import require_one
from llm.training.checkpoints import CheckpointConfig, Checkpointer, StreamedArray
from llm.training.run_directory import claim, write_atomically
from llm.training.run_lock import RunLock

MODEL_PIECE = 'model.gin'
# Of texts, where nothing says what the model was made for and the format wants a number.
_NO_LENGTH = 2048


@dataclasses.dataclass(frozen=True)
class Converted:
    """The config.gin of a run directory that `Convert` has made: what `generate` and others read of it.

    Attributes:
        model: its config.
        source: what it was made of.
        sequence_length: tokens that the model was made for; None if its files do not say.
        pooling: how the states of its tokens become one vector of a text, for `embed`; None if its files do not say.
    """

    model: ModelConfig
    source: str
    sequence_length: int | None = None
    pooling: PoolingConfig | None = None

    def __call__(self, invocation: Invocation) -> None:
        """Say what the model is."""
        del invocation
        print(f'{count_parameters(parameter_specs(self.model.build())):,} parameters, from {self.source}')


@dataclasses.dataclass(frozen=True)
class Convert:
    """Convert a model, its settings and its vocabulary.

    Attributes:
        source: a Hugging Face directory (config.json, safetensors, tokenizer), a run directory, a .gguf file, or a .bin
            file of llama2.c, whose tokenizer, a .bin file too, is the `vocabulary`.
        destination: a new directory; for 'gguf' a new file.
        to: its format: 'run' for what `generate`, `pretrain` (initial_parameters) and others here read,
            'hugging_face', 'gguf', or 'llama2c' (a directory with model.bin and tokenizer.bin); as programs of other
            runtimes, 'onnx', 'saved_model' (TensorFlow) or 'jax_export' (StableHLO).
        dtype: of the parameters written; None for that of the source. llama2.c has fp32 alone.
        block_type: for 'gguf', a quantized type of matrices in place of `dtype`.
        compute_dtype: of activations, for 'run'.
        model_type: for 'hugging_face', the family to write it as; None for the first that can describe it.
        shard_bytes: for 'hugging_face', the most that a file holds.
        checkpoint_step: of a run; None for the newest checkpoint that is whole.
        ignored_settings: names in a config.json that are not known here and are known to you to change nothing.
        vocabulary: where a vocabulary is, if not with the model.
        platforms: of JAX that 'saved_model' and 'jax_export' are compiled for.
    """

    source: str
    destination: str
    to: Literal['run', 'hugging_face', 'gguf', 'llama2c', 'onnx', 'saved_model', 'jax_export'] = 'run'
    dtype: StoredType | None = None
    block_type: Literal['Q8_0'] | None = None
    compute_dtype: ComputeType = 'float32'
    model_type: str | None = None
    shard_bytes: int = 5_000_000_000
    checkpoint_step: int | None = None
    ignored_settings: tuple[str, ...] = ()
    vocabulary: str | None = None
    platforms: tuple[str, ...] = PLATFORMS

    def __post_init__(self) -> None:
        formats = ('run', 'hugging_face', 'gguf', 'llama2c', *get_args(ProgramFormat))
        if self.to not in formats:
            raise UserError(f'Convert.to is {self.to!r}', fix=f'Use one of {", ".join(formats)}.')
        if self.block_type not in (None, 'Q8_0') or (self.block_type is not None and self.to != 'gguf'):
            raise UserError(f'Convert.block_type is {self.block_type!r}', fix="'Q8_0' is for 'gguf'; others need None.")
        if self.dtype is not None and self.dtype not in get_args(StoredType):
            raise UserError(f'Convert.dtype is {self.dtype!r}', fix=f'Use one of {", ".join(get_args(StoredType))}.')
        if self.shard_bytes < 1:
            raise UserError(f'Convert.shard_bytes is {self.shard_bytes}', fix='Use at least 1.')

    def __call__(self, invocation: Invocation) -> None:
        """Convert; UserError for whatever is wrong with the source or the destination."""
        require_one('convert')
        start = time.perf_counter()
        source, destination = Path(self.source).expanduser(), Path(self.destination).expanduser()
        options = SourceOptions(
            self.vocabulary, self.checkpoint_step, self.ignored_settings, self.compute_dtype, self.to != 'run'
        )
        model = open_model(source, options)
        parameters = count_parameters(parameter_specs(model.config.build()))
        kept = self.block_type or self.dtype or ', '.join(sorted({*model.dtypes.values()}))
        what = f'{source}: {parameters:,} parameters'
        if self.to == 'hugging_face':
            family, settings = find_family(model.config, self.model_type)
            what += f' as {settings.get("architectures", [family.architecture])[0]}'
        if self._makes_programs:
            check_exportable(model.config, cast(ProgramFormat, self.to), self.platforms)
            what += f' as {self.to}'
        if invocation.dry_run:
            print(f'{what}, to be written as {kept} to {destination}')
            return
        if model.vocabulary is None:
            print(f'{source} has no vocabulary: the model goes without one')
        writers = {
            'run': self._write_run,
            'hugging_face': self._write_hugging_face,
            'gguf': self._write_gguf,
            'llama2c': self._write_llama2c,
            **dict.fromkeys(get_args(ProgramFormat), self._write_programs),
        }
        writers[self.to](model, destination)
        print(f'{what}, written as {kept} to {destination} in {time.perf_counter() - start:.1f} s')

    @property
    def _makes_programs(self) -> bool:
        return self.to in get_args(ProgramFormat)

    def _write_run(self, model: SourceModel, directory: Path) -> None:
        converted = Converted(
            model.config, str(Path(self.source).expanduser().absolute()), model.sequence_length, model.pooling
        )
        text = render(converted)
        if any(directory.glob('*.safetensors')):
            raise UserError('is not empty and no run directory', where=str(directory), fix='Use a new directory.')
        with contextlib.ExitStack() as stack:
            stack.enter_context(RunLock(directory))
            claim(directory, converted, text, changeable=('source',))
            checkpointer = stack.enter_context(Checkpointer(directory / 'checkpoints', CheckpointConfig()))
            write_atomically(directory / MODEL_PIECE, _model_piece(text, converted.source))
            if checkpointer.latest_step() is not None:
                raise UserError('is converted already', where=str(directory), fix='Use it, or another directory.')
            if model.vocabulary is not None:
                model.vocabulary.save(directory / VOCABULARY)
                if model.chat_template is not None:
                    write_atomically(directory / VOCABULARY / 'chat_template.jinja', model.chat_template)
            parameters: dict[str, Any] = {}
            for name, spec in named_specs(parameter_specs(model.config.build())):
                node = parameters
                *parents, last = name.split('/')
                for parent in parents:
                    node = node.setdefault(parent, {})
                dtype = np.dtype(jnp.dtype(self.dtype or model.dtypes[name]))
                node[last] = StreamedArray(spec.shape, dtype, _reader(model, name, dtype))
            metadata = {} if model.vocabulary is None else {'vocabulary': model.vocabulary.digest}
            checkpointer.save(0, {'parameters': parameters}, metadata)

    def _write_hugging_face(self, model: SourceModel, directory: Path) -> None:
        names = ('bos', 'eos', 'pad')
        ids = {f'{name}_token_id': getattr(model.vocabulary, f'{name}_id', None) for name in names}
        if isinstance(model.config, EncoderDecoderConfig):
            ids['decoder_start_token_id'] = ids['pad_token_id']  # what the decoder reads first
        with _complete_or_absent(directory) as partial:
            write_directory(
                partial,
                model.config,
                model.read,
                dtype=self.dtype or _widest(model.dtypes),
                shard_bytes=self.shard_bytes,
                sequence_length=model.sequence_length,
                model_type=self.model_type,
                extra_settings=ids,
            )
            _write_vocabulary(model, partial)
            if model.pooling is not None:
                write_pooling(partial, model.pooling, model.config.d_model, model.sequence_length)

    def _write_programs(self, model: SourceModel, directory: Path) -> None:
        with _complete_or_absent(directory) as partial:
            partial.mkdir(parents=True)
            write_programs(
                partial,
                cast(ProgramFormat, self.to),
                model.config,
                model.read,
                {name: self.dtype or _widest({name: dtype}) for name, dtype in model.dtypes.items()},
                platforms=self.platforms,
                about={'source': self.source, 'sequence_length': model.sequence_length},
            )
            _write_vocabulary(model, partial)

    def _write_gguf(self, model: SourceModel, file: Path) -> None:
        if file.exists():
            raise UserError('is there already', where=str(file), fix='Use a new file.')
        if model.vocabulary is None:
            raise UserError('a GGUF file holds its vocabulary', where=self.source, fix='Set Convert.vocabulary.')
        config = _decoder(model)
        types: dict[str, GgufType] = {'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16'}
        partial = file.with_name(f'{file.name}.partial')
        try:
            write_gguf(
                partial,
                config,
                model.read,
                dtype=self.block_type or types[self.dtype or _widest(model.dtypes)],
                sequence_length=model.sequence_length or _NO_LENGTH,
                vocabulary=model.vocabulary,
                name=file.stem,
                chat_template=model.chat_template,
            )
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)

    def _write_llama2c(self, model: SourceModel, directory: Path) -> None:
        config, length = _decoder(model), model.sequence_length or _NO_LENGTH
        with _complete_or_absent(directory) as partial:
            partial.mkdir(parents=True)
            if model.vocabulary is not None:
                llama2c.write_tokenizer(partial / 'tokenizer.bin', model.vocabulary)
            llama2c.write_model(partial / 'model.bin', config, model.read, sequence_length=length)


def _decoder(model: SourceModel) -> DecoderConfig:
    if not isinstance(model.config, DecoderConfig):
        raise UserError(
            f'this format is for decoders ({type(model.config).__name__})',
            where='Convert.to',
            fix="Use 'hugging_face' or 'run'.",
        )
    return model.config


@contextlib.contextmanager
def _complete_or_absent(directory: Path) -> Iterator[Path]:
    """A place to write a directory to that gets its name when it is whole.

    Raises:
        UserError: there is one of that name, or it cannot be written.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError('is there already and not empty', where=str(directory), fix='Use a new directory.')
    partial = directory.with_name(f'{directory.name}.partial')
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        partial.replace(directory)
    except OSError as error:
        raise UserError(
            f'cannot write ({error.strerror})', where=str(directory), fix='Check permissions and free space.'
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_vocabulary(model: SourceModel, directory: Path) -> None:
    if model.vocabulary is not None:
        write_vocabulary(
            model.vocabulary,
            directory,
            chat_template=model.chat_template,
            max_length=model.sequence_length,
            ends=not isinstance(model.config, DecoderConfig),
        )


def _reader(model: SourceModel, name: str, dtype: np.dtype) -> Callable[[int, int], np.ndarray]:
    def read(start: int, stop: int) -> np.ndarray:
        values = model.read(name, (slice(start, stop),))
        with np.errstate(over='ignore'):
            cast = values.astype(dtype)
        if dtype == np.float16 and not np.isfinite(cast).all():
            raise UserError(f'parameter {name} has values that float16 cannot hold', fix="Use dtype 'bfloat16'.")
        return cast

    return read


def _widest(dtypes: dict[str, str]) -> StoredType:
    """One type that holds all of these without loss, float64 as float32."""
    found = {*dtypes.values()}
    if found == {'bfloat16'}:
        return 'bfloat16'
    return 'float16' if found == {'float16'} else 'float32'


def _model_piece(text: str, source: str) -> str:
    """The part of a config.gin that sets the model alone, to be included by run files in place of a preset."""
    blocks = text.split('\n\n')
    header = [line for line in blocks[0].splitlines() if not line.startswith('#') and 'jobs import convert' not in line]
    kept = [block for block in blocks[1:] if not block.startswith(('JOB = ', 'convert.Converted.'))]
    first = f'# The model converted from {source}, for run files: include it in place of a file of gin_configs/models.'
    return '\n\n'.join(('\n'.join([first, *header]), *kept))
