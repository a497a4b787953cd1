"""Multi-token prediction: further parts of a decoder that predict the tokens after the next one, for training.

Two forms, which share the decoder's embedding and output projection:

- parallel (Gloeckle et al. 2024, "Better & Faster Large Language Models via Multi-token Prediction", section 2): a head
  is one layer beside the decoder's last, and reads the same: the output of the trunk, all layers before the last.
- sequential (DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 2.2): module k reads what module k - 1 gave and
  the embedding of the token k ahead, so that every prediction knows all tokens before it.

Parameters are `multi_token/heads/...`, stacked along a leading axis 'depths'. The decoder itself is as it is without.
"""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from llm.errors import UserError
from llm.models.context import Context
from llm.models.layer import Layer, LayerConfig
from llm.models.normalization import Norm, NormConfig
from llm.models.parameters import Role, parameter, stack
from llm.models.position import PositionKind
from llm.parallel.sharding import constrain

# DeepSeek-V3, section 4.2: lambda for the first 10T tokens.
_DEEPSEEK_WEIGHT = 0.3


@dataclasses.dataclass(frozen=True)
class MultiTokenConfig:
    """Prediction of `depths` tokens after the next one.

    Attributes:
        depths: how many; n - 1 of Gloeckle et al., D of DeepSeek-V3.
        kind: 'parallel' or 'sequential'; see the module's docstring.
        weight: of the mean over depths of their losses, each a mean over its own targets (DeepSeek-V3, eq. 25). None
            for what the papers have: `depths` in parallel, a plain sum with the loss of the next token (Gloeckle et
            al., eq. 2); 0.3 in sequence.
        layer: what each of them is made of; None for one like the decoder's last.
    """

    depths: int = 1
    kind: Literal['parallel', 'sequential'] = 'sequential'
    weight: float | None = None
    layer: LayerConfig | None = None

    def __post_init__(self) -> None:
        where = 'MultiTokenConfig'
        if self.depths < 1:
            raise UserError(f'depths is {self.depths}', where=where, fix='Use at least 1, or multi_token = None.')
        if self.kind not in ('parallel', 'sequential'):
            raise UserError(f'kind is {self.kind!r}', where=where, fix="Use 'parallel' or 'sequential'.")
        if self.weight is not None and not self.weight > 0:
            raise UserError(f'weight is {self.weight}', where=where, fix='Use a positive number, or None.')

    @property
    def depth_weight(self) -> float:
        """What the mean loss of each depth counts for beside that of the next token."""
        usual = self.depths if self.kind == 'parallel' else _DEEPSEEK_WEIGHT
        return (usual if self.weight is None else self.weight) / self.depths

    def scaled(self, ratio: Fraction) -> 'MultiTokenConfig':
        """The same in a model `ratio` times as wide."""
        return dataclasses.replace(self, layer=None if self.layer is None else self.layer.scaled(ratio))


class NextTokenModule(nnx.Module):
    """One module of DeepSeek-V3 (section 2.2, eq. 21 and 22), normalised as the decoder is.

    Shapes: state [B, S, D], token [B, S, D], the embedding of the token k ahead -> [B, S, D].

    The projection from 2 D to D is kept as two of D x D. The module's own final norm is not in the paper's equations,
    but in the published weights (`shared_head.norm`). The first state is what the decoder's own logits are made of.
    """

    def __init__(self, layer: LayerConfig, norm: NormConfig | None, d_model: int, position: PositionKind) -> None:
        self.state_norm = Norm(norm or NormConfig(), d_model)
        self.token_norm = Norm(norm or NormConfig(), d_model)
        shape, axes = (2, d_model, d_model), ('sources', 'embed', 'combined')
        self.combine = parameter(shape, axes, Role.HIDDEN, inputs=(0, 1), outputs=(2,))
        self.layer = Layer(layer, d_model, position)
        self.final_norm = None if norm is None else Norm(norm, d_model)

    def combined(self, state: jax.Array, token: jax.Array) -> jax.Array:
        """What the layer reads (eq. 21)."""
        of_state, of_token = self.combine[...].astype(state.dtype)
        x = jnp.einsum('BSD,DF->BSF', self.state_norm(state), of_state)
        x = x + jnp.einsum('BSD,DF->BSF', self.token_norm(token), of_token)
        return constrain(x, ('batch', 'residual', 'embed'))

    def normalize(self, x: jax.Array) -> jax.Array:
        """What comes out of the layer, as the output projection reads it."""
        return x if self.final_norm is None else self.final_norm(x)


def run_head(
    head: Layer | NextTokenModule, source: tuple[jax.Array, ...], context: Context, key: jax.Array | None
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """One of them, which reads `source`, [B, S, D] each.

    Returns:
        What comes out of its layer; the same, as its own norm leaves it if it has one; its router's sums.
    """
    if isinstance(head, NextTokenModule):
        x, _, sums = head.layer(head.combined(*source), context, key)
        return x, head.normalize(x), sums
    x, _, sums = head(source[0], context, key)
    return x, x, sums


class MultiToken(nnx.Module):
    """All heads or modules of a decoder."""

    def __init__(
        self,
        config: MultiTokenConfig,
        layer: LayerConfig,
        norm: NormConfig | None,
        d_model: int,
        position: PositionKind,
    ) -> None:
        self.config = config
        one: Layer | NextTokenModule = (
            Layer(layer, d_model, position)
            if config.kind == 'parallel'
            else NextTokenModule(layer, norm, d_model, position)
        )
        self.heads = stack(one, config.depths, axis='depths')

    def __call__(
        self,
        trunk: jax.Array,
        hidden: jax.Array,
        tokens: Sequence[jax.Array],
        context: Context,
        *,
        embed: Callable[[jax.Array], jax.Array],
        normalize: Callable[[jax.Array], jax.Array],
        dropout_keys: Callable[[int], jax.Array | None],
        run: Callable[..., tuple[jax.Array, jax.Array, dict[str, jax.Array]]] = run_head,
    ) -> tuple[jax.Array, dict[str, dict[str, jax.Array]]]:
        """What the logits of the next token and of those after it are computed from: [B, n, S, D], n = depths + 1.

        Args:
            trunk: [B, S, D], what the decoder's last layer reads. hidden: [B, S, D], what its logits are computed from.
            tokens: ids [B, S] of the token after each input, of the one after that, and so on; as many as there are
                depths. Heads in parallel need none.
            embed: ids to embeddings [B, S, D]. normalize: the decoder's final norm.
            dropout_keys: the key of depth k = 0, 1, ...
            run: computes what `run_head` does, with recomputation for example.

        Returns:
            The states, and the sums of routers by depth; see Router.
        """
        states, state = [hidden], hidden
        sums: dict[str, dict[str, jax.Array]] = {}
        for depth in range(self.config.depths):
            head: Layer | NextTokenModule = jax.tree.map(operator.itemgetter(depth), self.heads)
            source = (state, embed(tokens[depth])) if self.config.kind == 'sequential' else (trunk,)
            state, normal, found = run(head, source, context, dropout_keys(depth))
            states.append(normal if self.config.kind == 'sequential' else normalize(normal))
            if found:
                sums[str(depth)] = jax.tree.map(lambda x: x[None], found)
        return jnp.stack(states, axis=1), sums


__all__ = ['MultiToken', 'MultiTokenConfig', 'NextTokenModule', 'run_head']
