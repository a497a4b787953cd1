"""The decoding loop: prompts of any lengths in one batch, a cache, tokens as they come.

    generator = Generator(model_config, SamplingConfig(temperature=0.8), mesh)
    decoding = generator.start(parameters, [Prompt((1, 17, 4)), Prompt((1, 9), index=1)], max_new_tokens=100)
    for new_tokens in decoding:      # a list of token ids per prompt
        ...

An encoder-decoder reads `Prompt.encoder_tokens`, once; its decoder goes on from `Prompt.tokens`.

What a prompt is continued with depends neither on the prompts beside it nor on padding (but for rounding, which differs
between shapes): its randomness is keyed by seed, index, sample and the position of each token.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm.errors import UserError
from llm.inference.sampling import SamplingConfig, row_keys, sample, token_keys
from llm.models.context import CACHED_TOKENS
from llm.models.decoder import Decoder, DecoderConfig
from llm.models.encoder import EncoderConfig
from llm.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from llm.models.model import ModelConfig
from llm.parallel.sharding import Axes, AxisRules, names, use_rules

# Why a row ended: it chose a stop token; it has all tokens asked for, or no position left; the caller ended it.
End = Literal['stop_token', 'length', 'finished']

_NO_TOKEN = -1
_SHORTEST = 32


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Tokens to continue, at least one.

    Attributes:
        tokens: ids, the token that begins a document first.
        encoder_tokens: of an encoder-decoder, ids that its encoder reads, at least one.
        index, sample: which prompt, and which sample of it: with the seed they decide its random numbers.
    """

    tokens: tuple[int, ...]
    index: int = 0
    sample: int = 0
    encoder_tokens: tuple[int, ...] = ()


def generating(model: ModelConfig) -> DecoderConfig | EncoderDecoderConfig:
    """The model, if it says tokens one after the other.

    Raises:
        UserError: it is an encoder, or was fine-tuned to say something else.
    """
    if isinstance(model, EncoderConfig):
        raise UserError(
            'the model is an encoder, which does not generate', fix='Use a decoder or an encoder-decoder, or `embed`.'
        )
    if isinstance(model, DecoderConfig) and model.num_outputs is not None:
        raise UserError(
            'the model was fine-tuned to something else than saying the next token',
            where='DecoderConfig.num_outputs',
            fix='Use one that was pretrained, or fine-tuned to answer.',
        )
    return model


class Generator:
    """The compiled programs that continue prompts with one model; parameters are passed in, so they may change.

    Batch sizes and lengths are rounded up to powers of two, so that few programs are compiled.

    Args:
        model: the decoder, or encoder-decoder.
        sampling: how tokens are chosen.
        mesh, rules: where the parameters live, and the cache will: keys and values, or states of constant size.
        num_tokens: ids from here on are never chosen; default: the whole vocabulary of the model.
        tokens_per_call: how many tokens are made at a time, after the first.
    """

    def __init__(
        self,
        model: DecoderConfig | EncoderDecoderConfig,
        sampling: SamplingConfig,
        mesh: Mesh,
        rules: AxisRules = AxisRules(),
        *,
        num_tokens: int | None = None,
        tokens_per_call: int = 8,
    ) -> None:
        self.config, self.sampling, self.mesh, self.rules = generating(model), sampling, mesh, rules
        self.num_tokens = model.vocab_size if num_tokens is None else num_tokens
        self.tokens_per_call = tokens_per_call
        decoder = model.build()
        self._graph: nnx.GraphDef = nnx.split(decoder)[0]
        axes = decoder.cache_axes()
        replicated = NamedSharding(mesh, PartitionSpec())
        cache = jax.tree.map(self._cache_sharding, axes, is_leaf=_is_axes)
        self.cache_grows = any(CACHED_TOKENS in each for each in jax.tree.leaves(axes, is_leaf=_is_axes))
        state = {'cache': cache, 'tokens': replicated, 'offsets': replicated, 'done': replicated, 'keys': replicated}
        self._prefill = jax.jit(
            self._under_rules(self._prefill_step), static_argnames='cache_length', out_shardings=state
        )
        self._continue = jax.jit(
            self._under_rules(self._decode_steps), donate_argnums=1, out_shardings=(state, replicated)
        )

    def _cache_sharding(self, axes: Axes) -> NamedSharding:
        return NamedSharding(self.mesh, self.rules.partition(axes, self.mesh, parameters=False))

    def start(
        self,
        parameters: Any,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        *,
        seed: int = 0,
        stop_tokens: Collection[int] = (),
    ) -> 'Decoding':
        """Prepare to continue `prompts`, together; iterating over the result does the work.

        Args:
            parameters: nested dict of arrays.
            max_new_tokens: tokens to make per prompt, at least 1; fewer where the model's positions end.
            stop_tokens: a row ends with the first of these, which is not given out.

        Raises:
            UserError: a prompt leaves no room for a token in the model's positions.
        """
        return Decoding(self, parameters, prompts, max_new_tokens, seed, stop_tokens)

    def room(self, prompt: Prompt) -> int | None:
        """How many tokens can follow `prompt`; None for any number."""
        longest = self.config.longest
        return None if longest is None else longest - len(prompt.tokens)

    def _under_rules(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            with use_rules(self.mesh, self.rules):
                return function(*arguments, **named)

        return wrapped

    def _choose(
        self, model: Decoder | EncoderDecoder, hidden: jax.Array, keys: jax.Array, positions: jax.Array
    ) -> jax.Array:
        """Tokens [B] for `positions` [B] from hidden states [B, 1, D]."""
        logits = model.logits(hidden)[:, 0]
        logits = jnp.where(jnp.arange(logits.shape[-1]) < self.num_tokens, logits, -jnp.inf)
        return sample(logits, self.sampling, token_keys(keys, positions))

    def _prefill_step(self, parameters: Any, batch: dict[str, Any], *, cache_length: int) -> dict[str, Any]:
        model = nnx.merge(self._graph, parameters)
        inputs, lengths = batch['inputs'], batch['lengths']
        if isinstance(model, EncoderDecoder):
            real = jnp.arange(batch['encoder_inputs'].shape[1]) < batch['encoder_lengths'][:, None]
            memory = model.encode(batch['encoder_inputs'], segment_ids=real.astype(jnp.int32))
            cache = model.init_cache(memory, cache_length, real.astype(jnp.int32))
        else:
            cache = model.init_cache(inputs.shape[0], cache_length)
        hidden, cache = model.decode_hidden(inputs, cache, 0, lengths=lengths)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
        keys = row_keys(batch['seed'], batch['indices'], batch['samples'])
        tokens = self._choose(model, last, keys, lengths)
        done = (lengths + 1 >= batch['limits']) | jnp.isin(tokens, batch['stop_tokens'])
        return {'cache': cache, 'tokens': tokens, 'offsets': lengths, 'done': done, 'keys': keys}

    def _decode_steps(
        self, parameters: Any, state: dict[str, Any], batch: dict[str, Any], finished: jax.Array
    ) -> tuple[dict[str, Any], jax.Array]:
        """Make up to `tokens_per_call` tokens per row, [B, tokens_per_call], _NO_TOKEN after the end of a row.

        In the state, `tokens` are those chosen last, and `offsets` their places, at which the cache lacks them yet.
        """
        model = nnx.merge(self._graph, parameters)
        made = jnp.full((finished.shape[0], self.tokens_per_call), _NO_TOKEN, jnp.int32)

        def unfinished(carry: tuple[Any, ...]) -> jax.Array:
            step, state, _ = carry
            return (step < self.tokens_per_call) & ~jnp.all(state['done'])

        def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            index, state, made = carry
            hidden, cache = model.decode_hidden(state['tokens'][:, None], state['cache'], state['offsets'])
            # Rows that are done go on writing over the same place, which nobody looks at.
            offsets = jnp.where(state['done'], state['offsets'], state['offsets'] + 1)
            tokens = self._choose(model, hidden, state['keys'], offsets)
            made = made.at[:, index].set(jnp.where(state['done'], _NO_TOKEN, tokens))
            done = state['done'] | (offsets + 1 >= batch['limits']) | jnp.isin(tokens, batch['stop_tokens'])
            return index + 1, {**state, 'cache': cache, 'tokens': tokens, 'offsets': offsets, 'done': done}, made

        state = {**state, 'done': state['done'] | finished}
        _, state, made = jax.lax.while_loop(unfinished, step, (0, state, made))
        return state, made


class Decoding:
    """Prompts being continued. Iterating gives, each time, a list of new tokens for each prompt (empty once it ended).

    Attributes:
        ends: why each row ended; None while it goes on.
    """

    def __init__(
        self,
        generator: Generator,
        parameters: Any,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        seed: int,
        stop_tokens: Collection[int],
    ) -> None:
        self._generator, self._parameters = generator, parameters
        self._stop_tokens = frozenset(stop_tokens)
        self.ends: list[End | None] = [None] * len(prompts)
        self._limits = []
        for prompt in prompts:
            if not prompt.tokens:
                raise ValueError('a prompt needs at least one token: begin it with the one that begins a document')
            if bool(prompt.encoder_tokens) != isinstance(generator.config, EncoderDecoderConfig):
                raise ValueError('an encoder-decoder, and nothing else, needs tokens for its encoder')
            room = generator.room(prompt)
            if room is not None and room < 1:
                raise UserError(
                    f'the prompt has {len(prompt.tokens)} tokens, but the model has {generator.config.longest} '
                    'positions, and needs one for the next token',
                    where=f'prompt {prompt.index + 1}',
                    fix='Shorten the prompt.',
                )
            new = max_new_tokens if room is None else min(max_new_tokens, room)
            self._limits.append(len(prompt.tokens) + new)
        self._counts = [limit - len(prompt.tokens) for limit, prompt in zip(self._limits, prompts, strict=True)]
        self._prompts = list(prompts)
        self._seed = seed

    def finish(self, row: int) -> None:
        """End a row: what is already being made of it is thrown away."""
        self.ends[row] = 'finished'

    def __iter__(self) -> Iterator[list[list[int]]]:
        if not self._prompts:
            return
        generator = self._generator
        batch, cache_length = self._batch()
        state = generator._prefill(self._parameters, batch, cache_length=cache_length)
        yield self._take(np.asarray(state['tokens'])[:, None])
        while None in self.ends:
            ended = np.ones(len(batch['lengths']), bool)
            ended[: len(self.ends)] = [end is not None for end in self.ends]
            state, made = generator._continue(self._parameters, state, batch, ended)
            yield self._take(np.asarray(made))

    def _batch(self) -> tuple[dict[str, np.ndarray], int]:
        """The prompts as arrays, padded to few different shapes, and the length of the cache."""
        generator = self._generator
        axes = names(generator.rules.partition(('batch',), generator.mesh, parameters=False)[0])
        ways = math.prod(generator.mesh.shape[axis] for axis in axes)
        rows = ways * _power_of_two(-(-len(self._prompts) // ways))
        lengths = [len(prompt.tokens) for prompt in self._prompts]
        cache_length = _power_of_two(max(_SHORTEST, *self._limits)) if generator.cache_grows else 0
        width = _power_of_two(max(_SHORTEST, *lengths))
        if (longest := generator.config.longest) is not None:
            cache_length, width = min(cache_length, longest), min(width, longest)

        def padded(values: Sequence[int], filling: int) -> np.ndarray:
            return np.array([*values, *[filling] * (rows - len(values))], np.int32)

        def array(width: int, tokens: Sequence[Sequence[int]]) -> np.ndarray:
            found = np.zeros((rows, width), np.int32)
            for row, each in enumerate(tokens):
                found[row, : len(each)] = each
            return found

        encoder: dict[str, np.ndarray] = {}
        if isinstance(generator.config, EncoderDecoderConfig):
            width = _power_of_two(max(lengths))  # 1, the token that decoders start with
            texts = [prompt.encoder_tokens for prompt in self._prompts]
            encoder = {
                'encoder_inputs': array(_power_of_two(max(_SHORTEST, *map(len, texts))), texts),
                'encoder_lengths': padded(list(map(len, texts)), 1),
            }
        batch = encoder | {
            'inputs': array(width, [prompt.tokens for prompt in self._prompts]),
            'lengths': padded(lengths, 1),
            'limits': padded(self._limits, 0),
            'indices': padded([prompt.index for prompt in self._prompts], 0),
            'samples': padded([prompt.sample for prompt in self._prompts], 0),
            'seed': np.array(self._seed, np.uint32),
            'stop_tokens': np.array(sorted(self._stop_tokens) or [_NO_TOKEN], np.int32),
        }
        return batch, cache_length

    def _take(self, made: np.ndarray) -> list[list[int]]:
        """The tokens of each row up to its end, from [B, n]; notes which rows end."""
        new: list[list[int]] = []
        for row in range(len(self._prompts)):
            taken: list[int] = []
            for token in made[row].tolist():
                if self.ends[row] is not None:
                    break
                if token in self._stop_tokens:
                    self.ends[row] = 'stop_token'
                    break
                taken.append(token)
                self._counts[row] -= 1
                if self._counts[row] < 1:
                    self.ends[row] = 'length'
            new.append(taken)
        return new


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple)


def _power_of_two(size: int) -> int:
    """The least power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()
