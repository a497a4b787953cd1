"""The programs of a model as others call them: named arrays in, named arrays out, sizes that may vary by name.

One description for every format. A decoder has

    logits    tokens [batch, length] -> logits [batch, length, V]
    decode    tokens [batch, length], lengths [batch], offsets [batch], cache_... -> logits [batch, V], new_cache_...

`decode` reads a prompt, padded on the right to its `lengths`, with offsets 0 and a cache of zeros; then one token at a
time, at `offsets` of what each row holds. The logits are those after the last real token of each row, and the new cache
goes into the next call. An encoder has `logits` and `encode`, an encoder-decoder `encode` and `logits`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm.errors import UserError
from llm.models.context import CACHED_TOKENS
from llm.models.decoder import DecoderConfig
from llm.models.encoder import EncoderConfig
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


def _real(lengths: jax.Array, tokens: jax.Array) -> jax.Array:
    """1 on real tokens and 0 on the padding after them: lengths [B], tokens [B, S] -> [B, S]."""
    return (jnp.arange(tokens.shape[1]) < lengths[:, None]).astype(jnp.int32)


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
    cache, structure, grows = _cache(config)

    def decode(parameters: Mapping[str, Any], arrays: Arrays) -> Arrays:
        model, lengths = bind(parameters), arrays['lengths']
        held = jax.tree.unflatten(structure, [arrays[each.name] for each in cache])
        hidden, held = model.decode_hidden(arrays['tokens'], held, arrays['offsets'], lengths=lengths)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
        new = {f'new_{each.name}': leaf for each, leaf in zip(cache, jax.tree.leaves(held), strict=True)}
        return {'logits': model.logits(last)[:, 0], **new}

    constraints = (*longest, *((f'{LENGTH} <= {ROOM}',) if grows else ()))
    if grows and config.longest is not None:
        constraints += (f'{ROOM} <= {config.longest}',)
    inputs = (_tokens(), _lengths(), _lengths('offsets'), *cache)
    outputs = (_logits(config), *(dataclasses.replace(each, name=f'new_{each.name}') for each in cache))
    return whole, Signature('decode', inputs, outputs, constraints, decode)


def _cache(config: DecoderConfig) -> tuple[tuple[Array, ...], Any, bool]:
    """The arrays of the cache, how they make one, and whether it grows with the tokens."""
    model = config.build()
    axes = model.cache_axes()
    leaves, structure = jax.tree_util.tree_flatten_with_path(
        jax.eval_shape(lambda: model.init_cache(1, 1, config.compute_dtype))
    )
    names = jax.tree.leaves(axes, is_leaf=lambda node: type(node) is tuple)
    dynamic = {'batch': BATCH, CACHED_TOKENS: ROOM}
    arrays = tuple(
        Array(
            '_'.join(('cache', *(str(key.key) for key in path))),
            tuple(dynamic.get(axis, size) for axis, size in zip(each, leaf.shape, strict=True)),
            str(leaf.dtype),
        )
        for (path, leaf), each in zip(leaves, names, strict=True)
    )
    return arrays, structure, any(CACHED_TOKENS in each for each in names)


def _of_encoder(config: EncoderConfig) -> tuple[Signature, ...]:
    bind = _bound(config)
    types = (_tokens('token_types'),) if config.token_types else ()
    inputs = (_tokens(), _lengths(), *types)
    longest = () if config.longest is None else (f'{LENGTH} <= {config.longest}',)

    def more(arrays: Arrays) -> Arrays:
        tokens = arrays['tokens']
        found = {'segment_ids': _real(arrays['lengths'], tokens), 'positions': _positions(tokens)}
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


def _of_encoder_decoder(config: Any) -> tuple[Signature, ...]:
    bind = _bound(config)
    read = (_tokens('encoder_tokens', ENCODER_LENGTH), _lengths('encoder_lengths'))

    def encoder(arrays: Arrays) -> Arrays:
        tokens = arrays['encoder_tokens']
        return {'segment_ids': _real(arrays['encoder_lengths'], tokens), 'positions': _positions(tokens)}

    def logits(parameters: Mapping[str, Any], arrays: Arrays) -> Arrays:
        tokens = arrays['tokens']
        more = {f'encoder_{name}': value for name, value in encoder(arrays).items()}
        more |= {'segment_ids': jnp.ones_like(tokens), 'positions': _positions(tokens)}
        return {'logits': bind(parameters)(tokens, arrays['encoder_tokens'], **more)}

    def encode(parameters: Mapping[str, Any], arrays: Arrays) -> Arrays:
        return {'states': bind(parameters).encode(arrays['encoder_tokens'], **encoder(arrays))}

    states = (Array('states', (BATCH, ENCODER_LENGTH, config.d_model), config.compute_dtype),)
    return (
        Signature('logits', (_tokens(), *read), (_logits(config, LENGTH),), (), logits),
        Signature('encode', read, states, (), encode),
    )


def parameter_shapes(config: ModelConfig, dtypes: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Of every parameter by path, in the given dtypes."""
    specs = named_specs(parameter_specs(config.build()))
    return {path: jax.ShapeDtypeStruct(spec.shape, np.dtype(dtypes[path])) for path, spec in specs}
