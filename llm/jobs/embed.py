"""The embed job: texts in, a vector of each out, from the newest checkpoint of a run."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from llm.configuration import Invocation
from llm.errors import UserError
from llm.inference.embedding import Embedder
from llm.jobs.compilation_cache import enable_compilation_cache
from llm.jobs.prompts import encoder_tokens, prompt_tokens, read_texts
from llm.jobs.trained_model import TrainedModel, open_trained_model
from llm.models.decoder import DecoderConfig
from llm.models.parameters import count_parameters, parameter_specs
from llm.models.pooling import PoolingConfig, PoolingKind
from llm.parallel.mesh import MeshConfig, make_mesh
from llm.parallel.sharding import AxisRules


@dataclasses.dataclass(frozen=True)
class Embed:
    """Embed texts with a trained model: an encoder, the encoder of an encoder-decoder, or a decoder.

    Encoders read a text between bos, if the vocabulary has one besides eos, and eos; decoders after bos.

    Attributes:
        run_directory: of the run that trained the model, or that `convert` made.
        text_file: a text a line, blank lines left out; or a .jsonl with an object a line.
        text_field, id_field: what holds the text and its id in a .jsonl; without id_field, a text's id is the number of
            its line.
        output_file: a new .npy file, float32 [texts, D], in the order of the texts; beside it, their ids, a line each,
            in a file of the same name and the ending .ids.
        pooling, normalize: how states become a vector, see PoolingConfig; None for what the run says, else for the mean
            of an encoder's states, or the last of a decoder's, as they are.
        max_length: tokens of a text, which is cut off after them; None for as many as the model was made for.
        batch_size: texts embedded together.
        checkpoint_step: which checkpoint; None for the newest that is whole.
    """

    run_directory: str
    text_file: str
    output_file: str
    text_field: str = 'text'
    id_field: str | None = None
    pooling: PoolingKind | None = None
    normalize: bool | None = None
    max_length: int | None = None
    batch_size: int = 64
    checkpoint_step: int | None = None
    mesh: MeshConfig = MeshConfig()
    rules: AxisRules = AxisRules()

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f'Embed.batch_size is {self.batch_size}', fix='Use at least 1.')
        if self.max_length is not None and self.max_length < 3:
            raise UserError(f'Embed.max_length is {self.max_length}', fix='Use at least 3.')
        if self.pooling is not None:
            PoolingConfig(self.pooling)

    def __call__(self, invocation: Invocation) -> None:
        """Embed; UserError for whatever is wrong with the run, the texts or the output file."""
        if not self.output_file.endswith('.npy'):
            raise UserError(f'Embed.output_file is {self.output_file!r}', fix='Give a name that ends in .npy.')
        model = open_trained_model(self.run_directory)
        texts = read_texts(self.text_file, self.text_field, 'text', 'text_field', self.id_field)
        pooling = self._pooling(model)
        most = self._most(model)
        rows = [self._tokens(model, text, None) for text, _ in texts]
        cut = sum(most is not None and len(row) > most for row in rows)
        if cut:
            rows = [self._tokens(model, text, most) for text, _ in texts]
        what = (
            f'{len(rows):,} texts of up to {max(map(len, rows)):,} tokens'
            f'{f", {cut:,} of them cut off after {most:,}" if cut else ""}, '
            f'{pooling.kind} of the states{", normalised" if pooling.normalize else ""}, '
            f'in {model.config.d_model} dimensions'
        )
        if invocation.dry_run:
            parameters = count_parameters(parameter_specs(model.config.build()))
            print(f'{model.directory}: {parameters:,} parameters\n{what}, to {self.output_file}')
            return
        output = Path(self.output_file).expanduser()
        names = output.with_suffix('.ids')
        for path in (output, names):
            if path.exists():
                raise UserError('is there already', where=str(path), fix='Choose another name, or delete it.')
        vectors = self._vectors(model, rows, pooling)
        if not np.isfinite(vectors).all():
            print(f'warning: {(~np.isfinite(vectors)).any(axis=1).sum():,} vectors are not finite', file=sys.stderr)
        if jax.process_index() == 0:
            _write(output, names, vectors, [name for _, name in texts])
            print(f'{output}: {what}')

    def _vectors(self, model: TrainedModel, rows: Sequence[Sequence[int]], pooling: PoolingConfig) -> np.ndarray:
        """float32 [rows, D]."""
        enable_compilation_cache()
        mesh = make_mesh(self.mesh)
        parameters = model.restore(mesh, self.rules, self.checkpoint_step).state
        embedder = Embedder(model.config, pooling, mesh, self.rules)
        vectors = np.zeros((len(rows), model.config.d_model), np.float32)
        # Texts of about one length together.
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            vectors[batch] = embedder(parameters, [rows[i] for i in batch])
        return vectors

    def _pooling(self, model: TrainedModel) -> PoolingConfig:
        said = model.pooling or PoolingConfig('last' if isinstance(model.config, DecoderConfig) else 'mean')
        normalize = said.normalize if self.normalize is None else self.normalize
        return PoolingConfig(self.pooling or said.kind, normalize)

    def _most(self, model: TrainedModel) -> int | None:
        """Tokens of a text."""
        longest = model.config.longest
        if self.max_length is not None and longest is not None and self.max_length > longest:
            raise UserError(
                f'Embed.max_length is {self.max_length} and the model has {longest} positions', fix='Use fewer.'
            )
        limits = [self.max_length or model.sequence_length, longest]
        return min((limit for limit in limits if limit is not None), default=None)

    def _tokens(self, model: TrainedModel, text: str, most: int | None) -> tuple[int, ...]:
        if isinstance(model.config, DecoderConfig):
            return prompt_tokens(model.vocabulary, text)[:most]
        return encoder_tokens(model.vocabulary, text, most)


def embed_with(run_directory: str, texts: Sequence[str]) -> np.ndarray:
    """float32 [texts, D]: vectors as the run says that they are pooled; what is too long for its model is cut off.

    Raises:
        UserError: whatever is wrong with the run.
    """
    job = Embed(run_directory, text_file='', output_file='')
    model = open_trained_model(run_directory)
    most = job._most(model)
    return job._vectors(model, [job._tokens(model, text, most) for text in texts], job._pooling(model))


def _write(output: Path, names: Path, vectors: np.ndarray, ids: list[str]) -> None:
    partial = output.with_name(f'{output.name}.partial')
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with partial.open('wb') as file:
            np.save(file, vectors)
        names.write_text(''.join(f'{name}\n' for name in ids), encoding='utf-8')
        partial.replace(output)
    except OSError as error:
        raise UserError(f'cannot write ({error.strerror})', where=str(output), fix='Check the path.') from error
