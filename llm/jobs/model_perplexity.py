"""Perplexity of a trained model as a stage of prepare_data: the same filter as `Perplexity`, with a scorer of JAX."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm.data.documents.document import Document
from llm.data.documents.quality.perplexity import PerplexityFilter
from llm.data.sources.files import file_identity
from llm.data.token_cache import Boundaries
from llm.errors import UserError
from llm.jobs.compilation_cache import enable_compilation_cache
from llm.jobs.trained_model import VOCABULARY, TrainedModel, open_trained_model
from llm.models.decoder import DecoderConfig
from llm.parallel.mesh import MeshConfig, make_mesh
from llm.parallel.sharding import AxisRules, names, use_rules
from llm.training.checkpoints.directory import step_path
from llm.training.checkpoints.manifest import MARKER
from llm.training.losses import token_negative_log_likelihood

# Tokens of the narrowest rows: each width is a program to compile.
_NARROWEST = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelPerplexity(PerplexityFilter):
    """Perplexity per token of a decoder that a run trained, the token that ends the document counted.

    As in the run's own evaluation: a document is cut into windows of `sequence_length` tokens, and the first token of a
    window is predicted from the one before it alone.

    Args:
        run_directory: of a pretraining or fine-tuning run, or of a converted model.
        checkpoint_step: None for the newest that is whole when the job starts in a process.
        sequence_length: tokens of a window; None for as many as the run was trained on.
        max_tokens: of a document that are scored, from its beginning; None scores all.
        batch_tokens: that are scored at once; how far memory and speed go.
        mesh, sharding: where the parameters live, in every process.
    """

    name: str = 'model_perplexity'
    run_directory: str
    checkpoint_step: int | None = None
    sequence_length: int | None = None
    max_tokens: int | None = None
    batch_tokens: int = 16_384
    mesh: MeshConfig = MeshConfig()
    sharding: AxisRules = AxisRules()

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ('sequence_length', 'max_tokens', 'batch_tokens'):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise UserError(f'{field} = {value} is not positive', where='ModelPerplexity')

    def identities(self) -> list[str]:
        """Of the run's config, vocabulary and checkpoint, and of the reference."""
        model = _open(self.run_directory)
        step = self._step(model)
        _length(model, self.sequence_length)
        marker = step_path(model.directory / 'checkpoints', step) / MARKER
        identities = [file_identity(str(model.directory / 'config.gin')), model.vocabulary.digest]
        return [*identities, file_identity(str(marker)), *self.reference_identities()]

    def perplexities(self, documents: Sequence[Document]) -> np.ndarray:
        scorer = _scorer(
            self.run_directory, self.checkpoint_step, self.sequence_length, self.batch_tokens, self.mesh, self.sharding
        )
        return scorer([document.text for document in documents], self.min_tokens, self.max_tokens)

    def _step(self, model: TrainedModel) -> int:
        if not model.steps:
            raise UserError('the run has no checkpoint', where=str(model.directory), fix='Train it first.')
        step = model.steps[-1] if self.checkpoint_step is None else self.checkpoint_step
        if step not in model.steps:
            raise UserError(
                f'there is no checkpoint of step {step}',
                where=str(model.directory),
                fix=f'There are those of {", ".join(map(str, model.steps))}.',
            )
        return step


class ModelScorer:
    """The compiled programs that give texts their perplexities.

    Widths are powers of two up to the window's, each with its own fixed number of rows, so there are few programs, and
    the sums over a row do not depend on the rows beside it, but for rounding.
    """

    def __init__(
        self, model: TrainedModel, parameters: Any, length: int, batch_tokens: int, mesh: Mesh, rules: AxisRules
    ) -> None:
        assert isinstance(model.config, DecoderConfig)
        self._vocabulary, self._parameters, self._length = model.vocabulary, parameters, length
        self._mesh, self._rules, self._batch_tokens = mesh, rules, batch_tokens
        self._boundaries = Boundaries.of(model.vocabulary)
        self._routed = model.config.routed
        self._graph: nnx.GraphDef = nnx.split(model.config.build())[0]
        self._run = jax.jit(self._sums, out_shardings=NamedSharding(mesh, PartitionSpec()))
        axes = names(rules.partition(('batch',), mesh, parameters=False)[0])
        self._ways = math.prod(mesh.shape[axis] for axis in axes)

    def __call__(self, texts: Sequence[str], min_tokens: int = 1, max_tokens: int | None = None) -> np.ndarray:
        """float64 [texts]; NaN for texts of fewer tokens."""
        start, end = self._boundaries.start, self._boundaries.end
        windows: list[np.ndarray] = []  # its inputs and last target
        owners: list[int] = []
        numbers = np.zeros(len(texts), np.int64)
        for i, ids in enumerate(self._vocabulary.encode_batch(texts)):
            tokens = np.concatenate([[start], ids, [end]])[: None if max_tokens is None else max_tokens + 1]
            if len(ids) + 1 < min_tokens or not len(ids):
                continue
            numbers[i] = len(tokens) - 1
            for first in range(0, len(tokens) - 1, self._length):
                windows.append(tokens[first : first + self._length + 1])
                owners.append(i)
        losses = self._losses(windows)
        sums = np.zeros(len(texts))
        np.add.at(sums, np.array(owners, np.int64), losses)
        with np.errstate(over='ignore', invalid='ignore', divide='ignore'):
            return np.where(numbers > 0, np.exp(sums / numbers), np.nan)

    def _losses(self, windows: list[np.ndarray]) -> np.ndarray:
        """float64 [windows]: summed negative log-likelihood in nats of all tokens of each but its first."""
        losses = np.zeros(len(windows))
        widths = np.array([self._width(len(window) - 1) for window in windows], np.int64)
        for width in np.unique(widths).tolist():
            rows = self._ways * max(1, self._batch_tokens // width // self._ways)
            some = np.flatnonzero(widths == width)
            for first in range(0, len(some), rows):
                batch = some[first : first + rows]
                inputs, targets, real = (np.zeros((rows, width), np.int32) for _ in range(3))
                inputs[:], targets[:] = self._boundaries.pad, self._boundaries.pad
                for row, index in enumerate(batch.tolist()):
                    window = windows[index]
                    inputs[row, : len(window) - 1], targets[row, : len(window) - 1] = window[:-1], window[1:]
                    real[row, : len(window) - 1] = 1
                losses[batch] = np.asarray(self._run(self._parameters, inputs, targets, real), np.float64)[: len(batch)]
        return losses

    def _width(self, length: int) -> int:
        return min(self._length, max(_NARROWEST, 1 << (length - 1).bit_length()))

    def _sums(self, parameters: Any, inputs: jax.Array, targets: jax.Array, real: jax.Array) -> jax.Array:
        with use_rules(self._mesh, self._rules):
            model = nnx.merge(self._graph, parameters)
            weights = real.astype(jnp.float32)
            hidden = model.hidden(inputs, segment_ids=real, token_weights=weights if self._routed else None)
            nll, _ = token_negative_log_likelihood(model.projection(), hidden, targets)
            return jnp.sum(jnp.where(real > 0, nll, 0.0), axis=1)


@functools.lru_cache(maxsize=2)
def _scorer(
    run_directory: str, step: int | None, length: int | None, batch_tokens: int, mesh: MeshConfig, rules: AxisRules
) -> ModelScorer:
    """Made once in a process, workers among them."""
    enable_compilation_cache()
    model = _open(run_directory)
    built = make_mesh(mesh)
    parameters = model.restore(built, rules, step).state
    return ModelScorer(model, parameters, _length(model, length), batch_tokens, built, rules)


def _open(run_directory: str) -> TrainedModel:
    model = open_trained_model(run_directory)
    if not isinstance(model.config, DecoderConfig) or model.config.num_outputs is not None:
        raise UserError(
            'the model of this run does not predict the next token of a text',
            where=str(Path(run_directory) / 'config.gin'),
            fix='Give the run of a decoder that is a language model.',
        )
    try:
        Boundaries.of(model.vocabulary)
    except UserError as error:
        raise UserError(error.what, where=str(model.directory / VOCABULARY), fix=error.fix) from error
    return model


def _length(model: TrainedModel, length: int | None) -> int:
    """Tokens of a window."""
    longest = model.config.longest
    found = length or model.sequence_length or longest
    if found is None:
        raise UserError(
            'the run does not say how long its rows were', where='ModelPerplexity.sequence_length', fix='Set it.'
        )
    if longest is not None and found > longest:
        raise UserError(
            f'sequence_length = {found} is more than the {longest} positions of the model', where='ModelPerplexity'
        )
    return found
