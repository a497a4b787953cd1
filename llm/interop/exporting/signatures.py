"""The programs of a model as others call them: named arrays in, named arrays out, sizes that may vary by name.

One description for every format. A decoder has

    logits    tokens [batch, length] -> logits [batch, length, V]
    decode    tokens [batch, length], lengths [batch], offsets [batch], cache_... -> logits [batch, V], new_cache_...

`decode` reads a prompt, padded on the right to its `lengths`, with offsets 0 and a cache of zeros; then one token at a
time, at `offsets` of what each row holds. The logits are those after the last real token of each row, and the new cache
goes into the next call. An encoder has `logits` and `encode`. An encoder-decoder has all three:

    encode    encoder_tokens [batch, encoder_length], encoder_lengths [batch] -> states, memory_...
    decode    as a decoder's, with encoder_lengths and memory_..., the keys and values that all of its calls read
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llm.errors import UserError
from llm.models.context import CACHED_TOKENS, MEMORY_TOKENS
from llm.models.decoder import DecoderConfig
from llm.models.encoder import EncoderConfig
from llm.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from llm.models.model import ModelConfig, layers_of
from llm.models.moe import MoeConfig
from llm.models.parameters import named_specs, parameter_specs

BATCH, LENGTH, ENCODER_LENGTH, ROOM = 'batch', 'length', 'encoder_length', 'room'
Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Array:
    """An input or output: its sizes, of which those that vary are names."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Signature:
    """A program of a model.

    Attributes:
        name, inputs, outputs.
        constraints: on sizes, as jax.export.symbolic_shape takes them.
        run: of parameters by path and arrays by name; gives the outputs by name.
    """

    name: str
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    constraints: tuple[str, ...]
    run: Callable[[Mapping[str, Any], Arrays], Arrays]

    def symbolic_inputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The inputs as JAX traces them, all with sizes of one scope."""
        scope = jax.export.SymbolicScope(self.constraints)
        found = {}
        for array in self.inputs:
            text = ', '.join(map(str, array.shape))
            shape = jax.export.symbolic_shape(text, scope=scope)
            found[array.name] = jax.ShapeDtypeStruct(shape, jnp.dtype(array.dtype))
        return found

    def described(self) -> dict[str, list[dict[str, Any]]]:
        """For a manifest."""
        return {
            side: [{'name': each.name, 'shape': list(each.shape), 'dtype': each.dtype} for each in arrays]
            for side, arrays in (('inputs', self.inputs), ('outputs', self.outputs))
        }


def signatures(config: ModelConfig, *, scan: bool = True) -> tuple[Signature, ...]:
    """The programs of a model, the main one, `logits`, first.

    Args:
        scan: loop over layers rather than write each one out.

    Raises:
        UserError: the model does something for which sizes must be known.
    """
    config = _plain(config, scan)
    if isinstance(config, DecoderConfig):
        return _of_decoder(config)
    return _of_encoder(config) if isinstance(config, EncoderConfig) else _of_encoder_decoder(config)


def check(config: ModelConfig) -> None:
    """Raises UserError where a model does something for which sizes must be known when it is exported."""
    for layer in layers_of(config):
        kind = getattr(getattr(layer.mixer, 'rotary_scaling', None), 'kind', 'none')
        if kind in ('dynamic', 'longrope'):
            raise UserError(
                f'rotary scaling {kind!r} depends on the length of a row, which a program leaves open',
                where='AttentionConfig.rotary_scaling',
                fix="Use TO = 'hugging_face', or a scaling of the kind 'linear', 'llama3' or 'yarn'.",
            )
        if isinstance(layer.feed_forward, MoeConfig) and layer.feed_forward.dispatch == 'capacity':
            raise UserError(
                'experts with a capacity drop tokens by the length of a row, which a program leaves open',
                where='MoeConfig.dispatch',
                fix="Export a model of dispatch 'dropless'.",
            )
    if config.compute_dtype == 'float64':
        raise UserError(
            "compute_dtype is 'float64'", where=type(config).__name__, fix="Use 'float32' or a shorter type."
        )


def _plain(config: Any, scan: bool) -> Any:
    """The model by the plainest implementations: others cut rows up, and need to know their length."""
    if isinstance(config, tuple):
        return tuple(_plain(each, scan) for each in config)
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value: Any = getattr(config, field.name)
        if field.name == 'implementation':
            value = 'reference'
        elif field.name == 'remat':
            value = 'none'
        elif field.name == 'scan_layers':
            value = scan
        else:
            value = _plain(value, scan)
        if value is not getattr(config, field.name):
            changed[field.name] = value
    return dataclasses.replace(config, **changed) if changed else config


def _bound(config: ModelConfig) -> Callable[[Mapping[str, Any]], Any]:
    """What makes the model of parameters by path."""
    module = config.build()
    graph, _ = nnx.split(module)
    paths = [path for path, _ in named_specs(parameter_specs(module))]
    structure = jax.tree.structure(parameter_specs(module))

    def bind(parameters: Mapping[str, Any]) -> Any:
        return nnx.merge(graph, jax.tree.unflatten(structure, [parameters[path] for path in paths]))

    return bind


def _tokens(name: str = 'tokens', length: str = LENGTH) -> Array:
    return Array(name, (BATCH, length), 'int32')


def _lengths(name: str = 'lengths') -> Array:
    return Array(name, (BATCH,), 'int32')


def _logits(config: ModelConfig, *positions: str) -> Array:
    classes = getattr(config, 'num_outputs', None) or config.vocab_size
    return Array('logits', (BATCH, *positions, classes), 'float32')


def _real(lengths: jax.Array, width: Any) -> jax.Array:
    """1 on real tokens and 0 on the padding after them: lengths [B] -> [B, width]."""
    return (jnp.arange(width) < lengths[:, None]).astype(jnp.int32)


def _positions(tokens: jax.Array) -> jax.Array:
    return jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]


def _of_decoder(config: DecoderConfig) -> tuple[Signature, ...]:
    bind = _bound(config)

    def logits(parameters: Mapping[str, Any], arrays: Arrays) -> Arrays:
        return {'logits': bind(parameters)(arrays['tokens'])}

    longest = () if config.longest is None else (f'{LENGTH} <= {config.longest}',)
    whole = Signature('logits', (_tokens(),), (_logits(config, LENGTH),), longest, logits)
    if config.num_outputs is not None:  # a model of classes continues nothing
        return (whole,)
    return whole, _decode(config, _cache(config))


@dataclasses.dataclass(frozen=True)
class _Cache:
    """What decoding carries: `structure` of `arrays`, or of these and, of an encoder-decoder, `memory`, by `places`.

    Attributes:
        structure: of the model's cache. places: of each of its leaves, the array that it is.
        arrays: that each call changes. memory: that `encode` makes.
    """

    structure: Any
    places: tuple[Array, ...]

    @property
    def arrays(self) -> tuple[Array, ...]:
        return tuple(each for each in self.places if not each.name.startswith('memory'))

    @property
    def memory(self) -> tuple[Array, ...]:
        return tuple(each for each in self.places if each.name.startswith('memory'))


def _cache(config: DecoderConfig | EncoderDecoderConfig) -> _Cache:
    model = config.build()
    dtype = jnp.dtype(config.compute_dtype)
    if isinstance(model, EncoderDecoder):
        bind, parameters = _bound(config), named_specs(parameter_specs(model))
        shapes = jax.eval_shape(
            lambda values, memory: bind(values).init_cache(memory, 1)['layers'],
            {path: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for path, spec in parameters},
            jax.ShapeDtypeStruct((1, 1, config.d_model), dtype),
        )
        axes = model.cache_axes()['layers']
    else:
        shapes, axes = jax.eval_shape(lambda: model.init_cache(1, 1, dtype)), model.cache_axes()
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    dynamic = {'batch': BATCH, CACHED_TOKENS: ROOM, MEMORY_TOKENS: ENCODER_LENGTH}
    found = []
    for (path, leaf), each in zip(leaves, jax.tree.leaves(axes, is_leaf=lambda x: type(x) is tuple), strict=True):
        sizes = tuple(dynamic.get(axis, size) for axis, size in zip(each, leaf.shape, strict=True))
        start = 'memory' if MEMORY_TOKENS in each else 'cache'
        found.append(Array('_'.join((start, *(str(key.key) for key in path))), sizes, str(leaf.dtype)))
    return _Cache(structure, tuple(found))


def _decode(config: DecoderConfig | EncoderDecoderConfig, cache: _Cache) -> Signature:
    """The step with a cache."""
    bind = _bound(config)
    encodes = isinstance(config, EncoderDecoderConfig)

    def decode(parameters: Mapping[str, Any], arrays: Arrays) -> Arrays:
        model, lengths = bind(parameters), arrays['lengths']
        held = jax.tree.unflatten(cache.structure, [arrays[each.name] for each in cache.places])
        if encodes:
            width = arrays[cache.memory[0].name].shape[2]
            held = {'layers': held, 'memory_segment_ids': _real(arrays['encoder_lengths'], width)}
        hidden, held = model.decode_hidden(arrays['tokens'], held, arrays['offsets'], lengths=lengths)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
        leaves = jax.tree.leaves(held['layers'] if encodes else held)
        by_name = {each.name: leaf for each, leaf in zip(cache.places, leaves, strict=True)}
        return {'logits': model.logits(last)[:, 0], **{f'new_{each.name}': by_name[each.name] for each in cache.arrays}}

    grows = any(ROOM in each.shape for each in cache.arrays)
    constraints: tuple[str, ...] = () if config.longest is None else (f'{LENGTH} <= {config.longest}',)
    constraints += (f'{LENGTH} <= {ROOM}',) if grows else ()
    if grows and config.longest is not None:
        constraints += (f'{ROOM} <= {config.longest}',)
    read = (_lengths('encoder_lengths'), *cache.memory) if encodes else ()
    inputs = (_tokens(), _lengths(), _lengths('offsets'), *read, *cache.arrays)
    outputs = (_logits(config), *(dataclasses.replace(each, name=f'new_{each.name}') for each in cache.arrays))
    return Signature('decode', inputs, outputs, constraints, decode)


def _of_encoder(config: EncoderConfig) -> tuple[Signature, ...]:
    bind = _bound(config)
    types = (_tokens('token_types'),) if config.token_types else ()
    inputs = (_tokens(), _lengths(), *types)
    longest = () if config.longest is None else (f'{LENGTH} <= {config.longest}',)

    def more(arrays: Arrays) -> Arrays:
        tokens = arrays['tokens']
        found = {'segment_ids': _real(arrays['lengths'], tokens.shape[1]), 'positions': _positions(tokens)}
        return found | ({'token_types': arrays['token_types']} if types else {})

    def logits(parameters: Mapping[str, Any], arrays: Arrays) -> Arrays:
        return {'logits': bind(parameters)(arrays['tokens'], **more(arrays))}

    def encode(parameters: Mapping[str, Any], arrays: Arrays) -> Arrays:
        model = bind(parameters)
        states = model.encode(arrays['tokens'], **more(arrays))
        return {'states': states} | ({'pooled': model.pooled(states)} if config.pooler else {})

    states = [Array('states', (BATCH, LENGTH, config.d_model), config.compute_dtype)]
    if config.pooler:
        states.append(Array('pooled', (BATCH, config.d_model), config.compute_dtype))
    return (
        Signature('logits', inputs, (_logits(config, LENGTH),), longest, logits),
        Signature('encode', inputs, tuple(states), longest, encode),
    )


def _of_encoder_decoder(config: EncoderDecoderConfig) -> tuple[Signature, ...]:
    bind = _bound(config)
    read = (_tokens('encoder_tokens', ENCODER_LENGTH), _lengths('encoder_lengths'))

    def encoder(arrays: Arrays) -> Arrays:
        tokens = arrays['encoder_tokens']
        return {'segment_ids': _real(arrays['encoder_lengths'], tokens.shape[1]), 'positions': _positions(tokens)}

    def logits(parameters: Mapping[str, Any], arrays: Arrays) -> Arrays:
        tokens = arrays['tokens']
        more = {f'encoder_{name}': value for name, value in encoder(arrays).items()}
        more |= {'segment_ids': jnp.ones_like(tokens), 'positions': _positions(tokens)}
        return {'logits': bind(parameters)(tokens, arrays['encoder_tokens'], **more)}

    cache = _cache(config)

    def encode(parameters: Mapping[str, Any], arrays: Arrays) -> Arrays:
        model = bind(parameters)
        states = model.encode(arrays['encoder_tokens'], **encoder(arrays))
        leaves = jax.tree.leaves(model.init_cache(states, 1)['layers'])
        by_name = {each.name: leaf for each, leaf in zip(cache.places, leaves, strict=True)}
        return {'states': states, **{each.name: by_name[each.name] for each in cache.memory}}

    states = Array('states', (BATCH, ENCODER_LENGTH, config.d_model), config.compute_dtype)
    return (
        Signature('logits', (_tokens(), *read), (_logits(config, LENGTH),), (), logits),
        Signature('encode', read, (states, *cache.memory), (), encode),
        _decode(config, cache),
    )
