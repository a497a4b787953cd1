"""A stack of layers, of an encoder or an encoder-decoder, in a pipeline."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from llm.models.context import Context
from llm.models.layer_stack import run_layers
from llm.models.stack import Stack
from llm.parallel.pipeline.stages import Layers
from llm.training.stages.model import for_each_repeat


@dataclasses.dataclass(frozen=True)
class StagedStack:
    """The layers of a stack as functions of their parameters.

    What all repeats have in common, a relative bias or the parameters of layers that share them, each repeat has for
    itself, and the gradients are added up at the end of a step.

    Attributes:
        stack: of shapes without values.
        first: index in the whole model of the first layer, for dropout.
        axis: logical axis of the repeats.
    """

    stack: Stack
    first: int = 0
    axis: str = 'layers'

    def parts(self, tree: Any) -> tuple[Any, Any, Any]:
        """Of the stack's parameters, or their specs: those of each repeat, stacked; of the remainder; the rest."""
        config = self.stack.config
        bias = {name: tree[name] for name in ('relative_bias',) if name in tree}
        rest = {name: tree[name] for name in ('final_norm',) if name in tree}
        layers, remainder = tree.get('layers', {}), tree.get('remainder', {})
        if config.shared_layers:
            layers = for_each_repeat(layers, config.repeats, axis=None)
        if layers:
            layers = {'layers': layers, **for_each_repeat(bias, config.repeats, self.axis)}
        return layers, {'layers': remainder, **bias} if remainder else {}, rest

    def context(self, positions: jax.Array, context: Context, dtype: Any) -> Context:
        """What all layers read, but for the relative bias, which is made of parameters."""
        return dataclasses.replace(context, rotary=self.stack.rotary(positions, dtype))

    def repeat(
        self, parameters: Any, x: jax.Array, index: jax.Array, context: Context, key: jax.Array | None
    ) -> Layers:
        """Repeat `index` of the pattern; see Stages.repeat."""
        first = self.first + index * len(self.stack.config.pattern)
        stacked = {**parameters, 'layers': jax.tree.map(lambda p: p[None], parameters['layers'])}
        x, losses, sums = self._run('layers', stacked, x, first, context, key)
        return x, losses, jax.tree.map(lambda s: s[0], sums)

    def remainder(self, parameters: Any, x: jax.Array, context: Context, key: jax.Array | None) -> Layers:
        """The layers after the last repeat; see Stages.remainder."""
        config = self.stack.config
        first = self.first + config.repeats * len(config.pattern)
        return self._run('remainder', parameters, x, first, context, key)

    def normalize(self, rest: Any, x: jax.Array) -> jax.Array:
        """What comes out of the last layer, as it is read, by the rest of the parameters. [B, S, D] -> the same."""
        norm = self.stack.final_norm
        return x if norm is None else nnx.merge(nnx.split(norm)[0], rest['final_norm'])(x)

    def _run(
        self,
        group: str,
        parameters: Any,
        x: jax.Array,
        first: jax.Array | int,
        context: Context,
        key: jax.Array | None,
    ) -> Layers:
        layers = nnx.merge(nnx.split(getattr(self.stack, group))[0], parameters['layers'])
        if self.stack.relative_bias is not None:
            bias = nnx.merge(nnx.split(self.stack.relative_bias)[0], parameters['relative_bias'])
            context = dataclasses.replace(context, distance_bias=bias())
        x, _, sums, _ = run_layers(dict(layers.items()), x, context, repeats=1, first=first, dropout_key=key)
        losses = {position: each.pop('loss').sum() for position, each in sums.items()}
        return x, losses, sums
