"""Texts to vectors: the states that a model gives to the tokens of a text, pooled.

    embedder = Embedder(model_config, PoolingConfig('mean', normalize=True), mesh)
    vectors = embedder(parameters, [(101, 7592, 102), (101, 102)])       # float32 [2, D]

What a text's vector is depends neither on the texts beside it nor on padding, but for rounding.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm.models.decoder import Decoder
from llm.models.model import ModelConfig
from llm.models.pooling import PoolingConfig, pool
from llm.parallel.sharding import AxisRules, names, use_rules

_SHORTEST = 16


class Embedder:
    """The compiled programs that embed rows of tokens with one model: a decoder, an encoder, or one with a decoder.

    Rows and lengths are rounded up to powers of two, so that few programs are compiled.

    Args:
        model: of an encoder-decoder, the encoder is run.
        pooling: how states become a vector.
        mesh, rules: where the parameters live.
    """

    def __init__(self, model: ModelConfig, pooling: PoolingConfig, mesh: Mesh, rules: AxisRules = AxisRules()) -> None:
        self.config, self.pooling, self.mesh, self.rules = model, pooling, mesh, rules
        self._graph: nnx.GraphDef = nnx.split(model.build())[0]
        self._run = jax.jit(self._embed, out_shardings=NamedSharding(mesh, PartitionSpec()))
        axes = names(rules.partition(('batch',), mesh, parameters=False)[0])
        self._ways = math.prod(mesh.shape[axis] for axis in axes)

    def __call__(self, parameters: Any, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """The vectors of rows of token ids, at least one token each: float32 [rows, D].

        Args:
            parameters: nested dict of arrays.
        """
        lengths = [len(row) for row in rows]
        if min(lengths) < 1:
            raise ValueError('a row has no tokens')
        width = _power_of_two(max(_SHORTEST, *lengths))
        longest = self.config.longest
        shape = (
            self._ways * _power_of_two(-(-len(rows) // self._ways)),
            width if longest is None else min(width, longest),
        )
        inputs, real = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for i, row in enumerate(rows):
            inputs[i, : len(row)], real[i, : len(row)] = row, 1
        return np.asarray(self._run(parameters, inputs, real), np.float32)[: len(rows)]

    def _embed(self, parameters: Any, inputs: jax.Array, real: jax.Array) -> jax.Array:
        with use_rules(self.mesh, self.rules):
            model = nnx.merge(self._graph, parameters)
            read = model.hidden if isinstance(model, Decoder) else model.encode
            return pool(read(inputs, segment_ids=real), real, self.pooling).astype(jnp.float32)


def _power_of_two(size: int) -> int:
    """The least power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()
