"""Mixture of experts: a router chooses a few of many feed-forward networks for each token (Shazeer et al. 2017)."""

import dataclasses
import functools
from fractions import Fraction
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llm.errors import UserError
from llm.kernels.grouped_matmul import grouped_matmul
from llm.models.context import Context
from llm.models.feed_forward import ACTIVATIONS, FeedForward, FeedForwardConfig
from llm.models.parameters import Role, parameter
from llm.models.routing import Capacity, Router, RouterConfig
from llm.parallel.expert_dispatch import Choices, dispatch
from llm.parallel.sharding import constrain, target_device


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """A layer of experts in place of a feed-forward layer.

    Attributes:
        num_experts: E. experts_per_token: of them that each token is sent to (on average, if experts choose).
        expert: the shape of each expert; fine-grained experts are many small ones (DeepSeekMoE, section 3.1).
        shared: a feed-forward layer that sees every token beside them; n shared experts are one of n times the size.
        shared_gate: whether a sigmoid of the token scales what the shared layer makes (Qwen2-MoE).
        router: see RouterConfig.
        dispatch: 'dropless', or 'capacity': in each group of tokens an expert takes its fair share times
            capacity_factor, and choices beyond that are dropped. Nothing is dropped where a cache is used.
        group_size: tokens of a row among which an expert's capacity is counted, whatever the mesh; None for the row.
        exchange_share: rows of one round of exchange between devices over what balanced experts need in all; the
            smaller, the less memory and the more rounds. See llm.parallel.expert_dispatch.
    """

    num_experts: int
    experts_per_token: int
    expert: FeedForwardConfig
    shared: FeedForwardConfig | None = None
    shared_gate: bool = False
    router: RouterConfig = RouterConfig()
    dispatch: Literal['dropless', 'capacity'] = 'dropless'
    capacity_factor: float = 1.25
    group_size: int | None = None
    exchange_share: float = 0.5

    def __post_init__(self) -> None:
        where = 'MoeConfig'
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise UserError(
                f'experts_per_token is {self.experts_per_token} of {self.num_experts} experts',
                where=where,
                fix='Use at least 1 and at most num_experts.',
            )
        if self.dispatch not in ('dropless', 'capacity'):
            raise UserError(f'dispatch is {self.dispatch!r}', where=where, fix="Use 'dropless' or 'capacity'.")
        if self.router.kind == 'expert_choice' and self.dispatch != 'capacity':
            raise UserError(
                'experts that choose their tokens need a capacity', where=where, fix="Use dispatch = 'capacity'."
            )
        groups = self.router.expert_groups
        size, rest = divmod(self.num_experts, groups)
        if rest or (groups > 1 and size < 2 and self.router.group_score == 'top_two'):
            raise UserError(
                f'{self.num_experts} experts in {groups} groups', where=where, fix='Make expert_groups a divisor.'
            )
        if size * self.router.groups_per_token < self.experts_per_token:
            raise UserError(
                f'{self.router.groups_per_token} groups of {size} experts have fewer than {self.experts_per_token}',
                where=where,
                fix='Raise groups_per_token.',
            )
        if self.expert.bias:
            raise UserError('experts have no biases', where='MoeConfig.expert', fix='Use bias = False.')
        if self.shared_gate and self.shared is None:
            raise UserError(
                'shared_gate without a shared layer', where=where, fix='Set shared, or shared_gate = False.'
            )
        for name in ('capacity_factor', 'exchange_share', 'group_size'):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f'{name} is {value}', where=where, fix='Use a positive number.')

    def build(self, d_model: int) -> 'MixtureOfExperts':
        """The module, of shapes without values."""
        return MixtureOfExperts(self, d_model)

    def idle_parameters(self, d_model: int) -> int:
        """Parameters of the experts that a token is not sent to."""
        matrices = 3 if self.expert.gated else 2
        return (self.num_experts - self.experts_per_token) * matrices * d_model * self.expert.d_ff

    def scaled(self, ratio: Fraction) -> 'MoeConfig':
        """The same layer in a model `ratio` times as wide: as many experts, each wider."""
        shared = None if self.shared is None else self.shared.scaled(ratio)
        return dataclasses.replace(self, expert=self.expert.scaled(ratio), shared=shared)


class Experts(nnx.Module):
    """Feed-forward networks of one shape, side by side. See FeedForward."""

    def __init__(self, config: FeedForwardConfig, num_experts: int, d_model: int) -> None:
        self.config = config
        inward, outward = (num_experts, d_model, config.d_ff), (num_experts, config.d_ff, d_model)
        hidden = functools.partial(parameter, role=Role.HIDDEN, inputs=(1,), outputs=(2,))
        self.gate = hidden(inward, self.axes['gate'], branch=True) if config.gated else None
        self.up = hidden(inward, self.axes['up'], branch=True)
        self.down = hidden(outward, self.axes['down'], residual=True)

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """Logical axes of the matrices by name."""
        inward, outward = ('experts', 'embed', 'mlp'), ('experts', 'mlp', 'embed')
        return {'gate': inward, 'up': inward, 'down': outward}

    def matrices(self, dtype: jnp.dtype) -> dict[str, jax.Array]:
        """[E, ...] by name, in the type of the products."""
        named = {'gate': self.gate, 'up': self.up, 'down': self.down}
        return {name: weight[...].astype(dtype) for name, weight in named.items() if weight is not None}

    def __call__(self, matrices: dict[str, jax.Array], rows: jax.Array, sizes: jax.Array) -> jax.Array:
        """What each expert makes of its rows, [R, D] -> the same; see grouped_matmul.

        Args:
            matrices: parts of `matrices()`, of some experts. sizes: rows of each of those.
        """
        product = functools.partial(grouped_matmul, sizes=sizes, device=target_device())
        activation, gated = ACTIVATIONS[self.config.activation]

        def activate(up: jax.Array, gate: jax.Array | None) -> jax.Array:
            return activation(up) if gate is None else activation(gate) * up

        # The backward pass computes the activation again, as in the feed-forward layer.
        hidden = jax.checkpoint(activate, prevent_cse=False)(
            product(rows, matrices['up']), product(rows, matrices['gate']) if gated else None
        )
        return product(checkpoint_name(hidden, 'feed_forward_hidden'), matrices['down'])

    def all_of_them(self, x: jax.Array, choices: Choices) -> jax.Array:
        """The same weighted sum with every expert computing every token: [B, S, D] -> [B, S, D]."""
        activation, gated = ACTIVATIONS[self.config.activation]
        weight = jnp.where(choices.kept, choices.weight, 0)

        def add(total: jax.Array, expert: tuple[jax.Array, dict[str, jax.Array]]) -> tuple[jax.Array, None]:
            index, matrices = expert
            up = jnp.einsum('BSD,DF->BSF', x, matrices['up'])
            hidden = activation(jnp.einsum('BSD,DF->BSF', x, matrices['gate'])) * up if gated else activation(up)
            made = jnp.einsum('BSF,FD->BSD', hidden, matrices['down'])
            share = jnp.sum(jnp.where(choices.expert == index, weight, 0), axis=-1, keepdims=True)
            return total + share * made, None

        indices = jnp.arange(next(iter(self.matrices(x.dtype).values())).shape[0], dtype=choices.expert.dtype)
        total = jnp.zeros(x.shape, jnp.promote_types(weight.dtype, x.dtype))
        return jax.lax.scan(add, total, (indices, self.matrices(x.dtype)))[0].astype(x.dtype)


class MixtureOfExperts(nnx.Module):
    """The weighted sum of the chosen experts, and the shared layer. Shapes: x [B, S, D] -> [B, S, D]."""

    def __init__(self, config: MoeConfig, d_model: int) -> None:
        self.config = config
        self.router = Router(config.router, d_model, config.num_experts, config.experts_per_token)
        self.experts = Experts(config.expert, config.num_experts, d_model)
        self.shared = None if config.shared is None else FeedForward(config.shared, d_model)
        gate = functools.partial(parameter, (d_model, 1), ('embed', 'one'), Role.ROUTER, inputs=(0,), outputs=(1,))
        self.shared_gate = gate() if config.shared_gate else None

    def __call__(self, x: jax.Array, context: Context) -> tuple[jax.Array, dict[str, jax.Array]]:
        """What the experts make of x, and the router's sums; see Router."""
        config = self.config
        x = constrain(x, ('batch', 'sequence', 'embed'))
        capacity = None
        if config.dispatch == 'capacity' and context.offset is None:
            capacity = Capacity(config.capacity_factor, config.group_size)
        choices, sums = self.router(x, context, capacity)
        if not all(isinstance(size, int) for size in x.shape):
            # Programs for other runtimes leave sizes open, by which sorted rows are cut up.
            y = self.experts.all_of_them(x, choices)
        else:
            y = dispatch(
                self.experts,
                x,
                choices,
                self.experts.matrices(x.dtype),
                self.experts.axes,
                config.num_experts,
                most_rows=None
                if capacity is None
                else functools.partial(self._most_rows, capacity, x.shape[1], context.token_index is not None),
                share=config.exchange_share,
            )
        y = constrain(y, ('batch', 'residual', 'embed'))
        if self.shared is not None:
            other = self.shared(x)
            if self.shared_gate is not None:
                other = other * jax.nn.sigmoid(jnp.einsum('BSD,DF->BSF', x, self.shared_gate[...].astype(x.dtype)))
            y = y + other
        return y, sums

    def _most_rows(self, capacity: Capacity, row: int, zigzag: bool, length: int, rows: int) -> int:
        """Choices of one expert that are kept among `rows` pieces of `length` tokens of rows of length `row`.

        Args:
            zigzag: whether a piece is two runs of tokens.
        """
        config = self.config
        most = capacity.tokens(row, config.experts_per_token, config.num_experts)
        group = capacity.group(row)
        whole = (length // 2 if zigzag else length) % group == 0
        groups = length // group if whole else length
        return rows * min(length, groups * most)
