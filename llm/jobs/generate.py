"""The generate job: prompts in, text out, from the newest checkpoint of a run."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import jax
import jax.numpy as jnp
from flax import nnx

from llm.configuration import Invocation
from llm.data.token_cache import Boundaries
from llm.errors import UserError
from llm.inference.generation import Decoding, End, Generator, Prompt, generating
from llm.inference.sampling import SamplingConfig, check_seed
from llm.inference.streaming import check_stop, stream_text
from llm.jobs.compilation_cache import enable_compilation_cache
from llm.jobs.prompts import encoder_tokens, prompt_tokens, read_prompts
from llm.jobs.trained_model import TrainedModel, open_trained_model
from llm.models.decoder import Decoder, DecoderConfig
from llm.models.encoder_decoder import EncoderDecoderConfig
from llm.models.parameters import count_parameters, parameter_specs
from llm.parallel.mesh import MeshConfig, make_mesh
from llm.parallel.sharding import AxisRules

# As output files say why a text ended.
_ENDS: dict[End | None, str] = {'stop_token': 'end of document', 'length': 'length', 'finished': 'stop string'}


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue prompts with a trained model, on the terminal as the text comes, or into a file.

    A prompt is the beginning of a document; a continuation ends where the model ends the document. An encoder-decoder
    reads a prompt with its encoder, and what it writes is the continuation.

    Attributes:
        run_directory: of the run that trained the model; it may still be going on.
        prompt: the text to continue; None, without a prompt_file, for a document from its start.
        prompt_file: many prompts, a line each; see `llm.jobs.prompts.read_prompts`.
        prompt_field: what holds the prompt in the lines of a .jsonl.
        output_file: a new file, of a JSON object a line: index (of the prompt, from 0), sample, prompt, continuation
            and end ('end of document', 'length' or 'stop string'); None for the terminal.
        max_new_tokens: of a continuation; fewer where the model's learned positions end.
        num_samples: continuations of each prompt.
        sampling: how tokens are chosen.
        stop: a continuation ends before the first of these strings.
        seed: with the same seed, a prompt at the same place in the file is continued with the same text.
        batch_size: continuations made together.
        checkpoint_step: which checkpoint; None for the newest that is whole.
    """

    run_directory: str
    prompt: str | None = None
    prompt_file: str | None = None
    prompt_field: str = 'prompt'
    output_file: str | None = None
    max_new_tokens: int = 200
    num_samples: int = 1
    sampling: SamplingConfig = SamplingConfig(temperature=0.8, top_p=0.95)
    stop: tuple[str, ...] = ()
    seed: int = 0
    batch_size: int = 8
    checkpoint_step: int | None = None
    mesh: MeshConfig = MeshConfig()
    rules: AxisRules = AxisRules()

    def __post_init__(self) -> None:
        for name in ('max_new_tokens', 'num_samples', 'batch_size'):
            if getattr(self, name) < 1:
                raise UserError(f'Generate.{name} is {getattr(self, name)}', fix='Use at least 1.')
        if self.prompt is not None and self.prompt_file is not None:
            raise UserError('Generate.prompt_file and prompt are both set', fix='Set one of them.')
        check_stop(self.stop)
        check_seed(self.seed, 'Generate')

    def __call__(self, invocation: Invocation) -> None:
        """Generate; UserError for whatever is wrong with the run, the prompts or the output file."""
        model = open_trained_model(self.run_directory)
        config = generating(model.config)
        texts = [self.prompt or ''] if self.prompt_file is None else read_prompts(self.prompt_file, self.prompt_field)
        encodes = isinstance(config, EncoderDecoderConfig)
        read = encoder_tokens if encodes else prompt_tokens
        tokens = [read(model.vocabulary, text) for text in texts]
        if invocation.dry_run:
            print(self._describe(model, tokens))
            return
        enable_compilation_cache()
        mesh = make_mesh(self.mesh)
        restored = model.restore(mesh, self.rules, self.checkpoint_step)
        longest = max(map(len, tokens)) + (0 if encodes else self.max_new_tokens)
        if model.sequence_length is not None and longest > model.sequence_length:
            _warn(f'texts of up to {longest} tokens, but the model was trained on {model.sequence_length}')

        generator = Generator(config, self.sampling, mesh, self.rules, num_tokens=model.vocabulary.size)
        # A decoder that has an encoder begins with padding, as it does in training.
        first = (Boundaries.of(model.vocabulary).pad,)
        prompts = [
            Prompt(first, i, sample, encoder_tokens=t) if encodes else Prompt(t, i, sample)
            for i, t in enumerate(tokens)
            for sample in range(self.num_samples)
        ]
        batches = [prompts[i : i + self.batch_size] for i in range(0, len(prompts), self.batch_size)]
        # All before the first runs, so that a prompt that is too long costs nobody's time.
        decodings = [
            generator.start(
                restored.state,
                batch,
                self.max_new_tokens,
                seed=self.seed,
                stop_tokens=(Boundaries.of(model.vocabulary).end,),
            )
            for batch in batches
        ]
        token_bytes = model.vocabulary.token_bytes()
        with self._output(texts, repeats=not encodes) as output:
            for batch, decoding in zip(batches, decodings, strict=True):
                for new in stream_text(decoding, token_bytes, self.stop):
                    output.show(batch, decoding, new)

    @contextlib.contextmanager
    def _output(self, texts: list[str], *, repeats: bool) -> Iterator['_Output']:
        """Where to; `repeats` shows a prompt before its continuation."""
        if jax.process_index() > 0:
            yield _Nowhere()
        elif self.output_file is None:
            shown = texts if repeats else [''] * len(texts)
            yield _Terminal(shown, sys.stdout, titles=len(texts) * self.num_samples > 1)
        else:
            path = Path(self.output_file).expanduser()
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open('x', encoding='utf-8', errors='backslashreplace') as file:
                    yield _Lines(texts, file)
            except FileExistsError:
                raise UserError(
                    'the output file exists already', where=str(path), fix='Choose another name, or delete it.'
                ) from None
            except OSError as error:
                raise UserError(f'cannot write ({error.strerror})', where=str(path), fix='Check the path.') from error
            print(f'{path}: {len(texts) * self.num_samples} continuations of {len(texts)} prompts')

    def _describe(self, model: TrainedModel, tokens: list[tuple[int, ...]]) -> str:
        """What --dry_run shows."""
        step = self.checkpoint_step or max(model.steps, default=None)
        parameters = count_parameters(parameter_specs(model.config.build()))
        together = min(self.batch_size, len(tokens) * self.num_samples)
        cache = _cache_shapes(generating(model.config), together, max(map(len, tokens)), self.max_new_tokens)
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
        chosen = {name: value for name, value in dataclasses.asdict(self.sampling).items() if value is not None}
        ends = ['the end of the document', *map(repr, self.stop)]
        return '\n'.join(
            (
                f'model       {model.directory}: {parameters:,} parameters, '
                + ('no checkpoint yet' if step is None else f'checkpoint of step {step}'),
                f'vocabulary  {model.vocabulary.kind}, {model.vocabulary.size:,} tokens',
                f'prompts     {len(tokens):,} of up to {max(map(len, tokens)):,} tokens, {self.num_samples} '
                f'continuations each of up to {self.max_new_tokens:,} tokens, {together} at a time',
                f'sampling    {", ".join(f"{name} {value}" for name, value in chosen.items())}, seed {self.seed}',
                f'until       {", ".join(ends)}',
                f'cache       {size / 1e6:,.1f} MB',
                f'output      {self.output_file or "the terminal"}',
            )
        )


def _cache_shapes(config: DecoderConfig | EncoderDecoderConfig, rows: int, prompt: int, new: int) -> Any:
    """Arrays of the cache, by shape, for prompts of `prompt` tokens and `new` after them."""
    module = config.build()
    if isinstance(module, Decoder):
        return jax.eval_shape(lambda: module.init_cache(rows, prompt + new))
    graph, state = nnx.split(module)

    def cache(state: Any) -> Any:
        memory = jnp.zeros((rows, prompt, config.d_model), config.compute_dtype)
        return nnx.merge(graph, state).init_cache(memory, 1 + new)

    return jax.eval_shape(cache, state)


class _Output(Protocol):
    def show(self, batch: Sequence[Prompt], decoding: Decoding, new: list[str]) -> None:
        """Take the new text of each row of a batch, the rest of which is still to come where its end is None."""


class _Nowhere:
    def show(self, batch: Sequence[Prompt], decoding: Decoding, new: list[str]) -> None:
        pass


class _Terminal:
    """Streams the first row that has not ended; the rows after it wait for their turn."""

    def __init__(self, texts: list[str], file: TextIO, *, titles: bool) -> None:
        self._texts, self._file, self._titles = texts, file, titles
        self._waiting: list[str] = []
        self._row = 0

    def show(self, batch: Sequence[Prompt], decoding: Decoding, new: list[str]) -> None:
        if not self._waiting:
            self._row = 0
            self._waiting = [self._opening(prompt) for prompt in batch]
        self._waiting = [waiting + more for waiting, more in zip(self._waiting, new, strict=True)]
        while self._row < len(batch):
            self._file.write(_visible(self._waiting[self._row]))
            self._waiting[self._row] = ''
            if decoding.ends[self._row] is None:
                break
            self._file.write('\n')
            self._row += 1
        else:
            self._waiting = []
        self._file.flush()

    def _opening(self, prompt: Prompt) -> str:
        title = f'--- prompt {prompt.index + 1}, sample {prompt.sample + 1} ---\n' if self._titles else ''
        return title + self._texts[prompt.index]


class _Lines:
    """Writes a JSON object for each row, in order, once the batch has ended."""

    def __init__(self, texts: list[str], file: TextIO) -> None:
        self._texts, self._file = texts, file
        self._continuations: list[str] = []

    def show(self, batch: Sequence[Prompt], decoding: Decoding, new: list[str]) -> None:
        self._continuations = [a + b for a, b in zip(self._continuations or [''] * len(batch), new, strict=True)]
        if None in decoding.ends:
            return
        for prompt, continuation, end in zip(batch, self._continuations, decoding.ends, strict=True):
            record = {
                'index': prompt.index,
                'sample': prompt.sample,
                'prompt': self._texts[prompt.index],
                'continuation': continuation,
                'end': _ENDS[end],
            }
            self._file.write(json.dumps(record, ensure_ascii=False) + '\n')
        self._file.flush()
        self._continuations = []


# A model may write escape sequences, which would steer the terminal: control characters are shown by their pictures.
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in '\n\t'} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def _visible(text: str) -> str:
    return text.translate(_PICTURES)


def _warn(message: str) -> None:
    if jax.process_index() == 0:
        print(f'warning: {message}', file=sys.stderr, flush=True)
