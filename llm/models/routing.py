"""Routers: which experts see a token, with which weight, and what keeps the experts equally busy."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm.errors import UserError
from llm.models.context import Context
from llm.models.parameters import Role, parameter
from llm.parallel.expert_dispatch import Choices

Kind = Literal['top_k', 'expert_choice', 'hash']


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """How tokens and experts find each other.

    Attributes:
        kind: 'top_k': each token takes the experts with the highest scores (Shazeer et al. 2017). 'expert_choice': each
            expert takes its tokens, as many as its capacity (Zhou et al. 2022); it sees later tokens, so such a model
            cannot generate. 'hash': by token id alone, without parameters (Roller et al. 2021).
        score: of a token for an expert, from the router's logits: 'softmax' over experts, or 'sigmoid' (DeepSeek-V3).
        normalize: whether the weights of a token's experts are divided by their sum.
        scaling: factor on the weights.
        expert_groups, groups_per_token: experts come in equal groups, and a token may only use those of its best groups
            (DeepSeek-V2, section 2.2.2). group_score: of a group: its 'max', or the sum of its 'top_two' (DeepSeek-V3).
        balance_loss: coefficient of the load-balancing loss, within each row (Fedus et al. 2021, "Switch", eq. 4).
        z_loss: coefficient of the squared log-partition function of the logits (Zoph et al. 2022, "ST-MoE", eq. 5).
        bias_rate: loss-free balancing (Wang et al. 2024): a bias per expert, added to the scores for the choice only,
            goes down by this after each step in which the expert had more than its share, and up otherwise. None: none.
        hash: 'random' by a hash of the id; 'balanced': ids are dealt out, most frequent first, each to the expert with
            the least so far (Roller et al. 2021, section 3.1).
        hash_seed: of the hash; other layers should have others.
        hash_frequencies: file with one number per token id for 'balanced', a text line each; None for equal ones.
        hash_ids: number of ids that are dealt out if there is no file: the vocabulary's size.
    """

    kind: Kind = 'top_k'
    score: Literal['softmax', 'sigmoid'] = 'softmax'
    normalize: bool = True
    scaling: float = 1.0
    expert_groups: int = 1
    groups_per_token: int = 1
    group_score: Literal['max', 'top_two'] = 'max'
    balance_loss: float = 0.01
    z_loss: float = 0.001
    bias_rate: float | None = None
    hash: Literal['random', 'balanced'] = 'random'
    hash_seed: int = 0
    hash_frequencies: str | None = None
    hash_ids: int | None = None

    def __post_init__(self) -> None:
        where = 'RouterConfig'
        choices = {'kind': get_args(Kind), 'score': ('softmax', 'sigmoid'), 'group_score': ('max', 'top_two')}
        for name, known in {**choices, 'hash': ('random', 'balanced')}.items():
            if getattr(self, name) not in known:
                raise UserError(
                    f'{name} is {getattr(self, name)!r}', where=where, fix=f'Use one of {", ".join(known)}.'
                )
        for name in ('balance_loss', 'z_loss', 'bias_rate'):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f'{name} is {getattr(self, name)}', where=where, fix='Use at least 0.')
        if not 1 <= self.groups_per_token <= self.expert_groups:
            raise UserError(
                f'groups_per_token is {self.groups_per_token} of {self.expert_groups} groups',
                where=where,
                fix='Use at least 1 and at most expert_groups.',
            )
        if self.kind != 'top_k' and (self.bias_rate is not None or self.expert_groups > 1):
            raise UserError(
                f'a router of kind {self.kind!r} has a bias_rate or expert_groups',
                where=where,
                fix="Leave them out, or use kind 'top_k'.",
            )
        if self.kind == 'hash' and self.hash == 'balanced' and not (self.hash_ids or self.hash_frequencies):
            raise UserError(
                'a balanced hash does not know the vocabulary',
                where=where,
                fix='Set hash_ids to its size, or hash_frequencies to a file.',
            )


@functools.cache
def balanced_table(frequencies: str | None, ids: int | None, num_experts: int, seed: int) -> np.ndarray:
    """[ids] expert of each token id; ids of equal frequency come in an order that `seed` decides.

    Raises:
        UserError: the file cannot be read.
    """
    if frequencies is None:
        counts = np.ones(ids or 1)
    else:
        try:
            counts = np.loadtxt(Path(frequencies).expanduser(), ndmin=1)
        except (OSError, ValueError) as error:
            raise UserError(
                f'cannot read token frequencies ({error})', where=frequencies, fix='Give one number a line.'
            ) from error
    order = np.random.default_rng(seed).permutation(len(counts))
    order = order[np.argsort(-counts[order], kind='stable')]
    table, load = np.zeros(len(counts), np.int32), np.zeros(num_experts)
    dealt = np.zeros(num_experts)  # ids that never occur are dealt out evenly too
    for token in order:
        expert = np.lexsort((dealt, load))[0]
        table[token] = expert
        load[expert] += counts[token]
        dealt[expert] += 1
    return table


def hashed(ids: jax.Array, seed: int | jax.Array, ways: int) -> jax.Array:
    """Integers from 0 to ways - 1, the same for the same id and seed; multiply and shift, as MurmurHash3 ends."""
    x = ids.astype(jnp.uint32) ^ (jnp.asarray(seed, jnp.uint32) * jnp.uint32(0x9E3779B9))
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        x = (x ^ (x >> 16)) * jnp.uint32(factor)
    return ((x ^ (x >> 16)) % jnp.uint32(ways)).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Capacity:
    """A limit on an expert's tokens in each group of `group_size` tokens of a row; `factor` 1 is its fair share."""

    factor: float
    group_size: int | None

    def group(self, length: int) -> int:
        """Tokens of a group in rows of `length`.

        Raises:
            UserError: rows do not divide into groups.
        """
        size = self.group_size or length
        if length % size:
            raise UserError(
                f'rows of {length} tokens cannot be divided into groups of {size}',
                where='MoeConfig.group_size',
                fix='Use a divisor, or None for whole rows.',
            )
        return size

    def tokens(self, length: int, per_token: int, num_experts: int) -> int:
        """Most tokens of one expert in a group."""
        group = self.group(length)
        return min(group, max(1, -int(-self.factor * group * per_token // num_experts)))


class Router(nnx.Module):
    """Scores of tokens for experts, and the choice. In at least float32, whatever the model computes in."""

    def __init__(self, config: RouterConfig, d_model: int, num_experts: int, per_token: int) -> None:
        self.config, self.num_experts, self.per_token = config, num_experts, per_token
        # Axes of its own, not 'experts': every device needs the scores of all.
        kernel = functools.partial(parameter, (d_model, num_experts), ('embed', 'routes'), Role.ROUTER)
        bias = functools.partial(parameter, (num_experts,), ('routes',), Role.VECTOR)
        self.kernel = None if config.kind == 'hash' else kernel(inputs=(0,), outputs=(1,), full_precision=True)
        rate = config.bias_rate
        self.bias = None if rate is None else bias(outputs=(0,), constant=0.0, sign_rate=rate)

    def __call__(
        self, x: jax.Array, context: Context, capacity: Capacity | None
    ) -> tuple[Choices, dict[str, jax.Array]]:
        """The choice for x [B, S, D], and its sums; see `routing_sums`."""
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        real = token_weights(x, context, dtype) > 0
        if self.kernel is None:
            choices = self._by_hash(context, dtype)
            logits = None
        else:
            kernel = self.kernel[...].astype(dtype)
            logits = jnp.einsum('BSD,DE->BSE', x.astype(dtype), kernel, precision=jax.lax.Precision.HIGHEST)
            if self.config.kind == 'expert_choice':
                return self._by_experts(logits, real, context, capacity)
            choices = self._by_tokens(logits)
        chosen = choices.kept & real[..., None]
        kept = chosen
        if capacity is not None:
            kept = _within_capacity(choices.expert, chosen, capacity, self.num_experts, context.token_index)
        sums = self._sums(logits, choices.expert, chosen, kept, context)
        return dataclasses.replace(choices, kept=kept), sums

    def scores(self, logits: jax.Array) -> jax.Array:
        """Of tokens for experts. [B, S, E] -> the same."""
        return jax.nn.softmax(logits) if self.config.score == 'softmax' else jax.nn.sigmoid(logits)

    def _by_tokens(self, logits: jax.Array) -> Choices:
        config = self.config
        scores = self.scores(logits)
        ranked = jax.lax.stop_gradient(scores)
        if self.bias is not None:
            ranked = ranked + jax.lax.stop_gradient(self.bias[...]).astype(ranked.dtype)
        if config.groups_per_token < config.expert_groups:
            ranked = self._of_best_groups(ranked)
        _, expert = jax.lax.top_k(ranked, self.per_token)
        weight = jnp.take_along_axis(scores, expert, axis=-1)
        if config.normalize:
            # Sigmoids may all be next to nothing.
            weight = weight / (weight.sum(-1, keepdims=True) + (1e-20 if config.score == 'sigmoid' else 0.0))
        return Choices(expert, weight * config.scaling, jnp.ones(expert.shape, bool))

    def _of_best_groups(self, ranked: jax.Array) -> jax.Array:
        config = self.config
        apart = ranked.reshape(*ranked.shape[:-1], config.expert_groups, -1)
        score = apart.max(-1) if config.group_score == 'max' else jax.lax.top_k(apart, 2)[0].sum(-1)
        _, best = jax.lax.top_k(score, config.groups_per_token)
        allowed = jax.nn.one_hot(best, config.expert_groups, dtype=bool).any(-2)
        return jnp.where(allowed[..., None], apart, -jnp.inf).reshape(ranked.shape)

    def _by_hash(self, context: Context, dtype: Any) -> Choices:
        config, ids = self.config, context.token_ids
        if ids is None:
            raise ValueError('hash layers need Context.token_ids')
        if config.hash == 'balanced':
            table = balanced_table(config.hash_frequencies, config.hash_ids, self.num_experts, config.hash_seed)
            expert = jnp.take(jnp.asarray(table), ids, mode='clip')[..., None]
        else:
            # Different experts for one token: the first by a hash, the others at hashed distances.
            expert = hashed(ids, config.hash_seed, self.num_experts)[..., None]
        # More experts per token are the next ones.
        expert = (expert + jnp.arange(self.per_token)) % self.num_experts
        weight = jnp.full(expert.shape, config.scaling / self.per_token, dtype)
        return Choices(expert.astype(jnp.int32), weight, jnp.ones(expert.shape, bool))

    def _by_experts(
        self, logits: jax.Array, real: jax.Array, context: Context, capacity: Capacity | None
    ) -> tuple[Choices, dict[str, jax.Array]]:
        if capacity is None:
            raise UserError(
                'experts that choose their tokens see later tokens, and cannot generate',
                where='RouterConfig.kind',
                fix="Use 'top_k' for a model that generates.",
            )
        scores = self.scores(logits)
        length = logits.shape[1]
        size, most = capacity.group(length), capacity.tokens(length, self.per_token, self.num_experts)
        ranked = jnp.where(real[..., None], jax.lax.stop_gradient(scores), -1.0)
        ranked = _in_order(ranked, context.token_index)
        groups = ranked.reshape(len(ranked), -1, size, self.num_experts).swapaxes(2, 3)  # [B, groups, E, tokens]
        _, best = jax.lax.top_k(groups, most)
        chosen = jnp.zeros(groups.shape, bool)
        chosen = jnp.put_along_axis(chosen, best, True, axis=-1, inplace=False)
        chosen = _as_laid_out(chosen.swapaxes(2, 3).reshape(ranked.shape), context.token_index) & real[..., None]
        expert = jnp.broadcast_to(jnp.arange(self.num_experts, dtype=jnp.int32), chosen.shape)
        sums = self._sums(logits, expert, chosen, chosen, context)
        # A choice is of an expert here; what is lost are tokens that none took.
        sums['dropped'] = jnp.sum(real & ~chosen.any(-1)).astype(scores.dtype)
        sums['assignments'] = sums['routed']
        return Choices(expert, jnp.where(chosen, scores, 0) * self.config.scaling, chosen), sums

    def _sums(
        self, logits: jax.Array | None, expert: jax.Array, chosen: jax.Array, kept: jax.Array, context: Context
    ) -> dict[str, jax.Array]:
        """Sums over tokens, of which losses and metrics are made by whoever holds the global count of tokens.

        'loss' is what the layer adds to the summed loss, the only one with a gradient. 'balance' and 'z' are the two
        losses without coefficients. 'entropy' [nats] of the scores, 'load' [E] choices of each expert, 'dropped' and
        'assignments' choices in all, 'routed' tokens.
        """
        like = chosen if logits is None else logits
        dtype = jnp.promote_types(jnp.float32, like.dtype if logits is not None else jnp.float32)
        weights = token_weights(like, context, dtype)
        real = (weights > 0).astype(dtype)
        # [B, E]; a one-hot matrix never exists: the compiler adds it up as it is made.
        hits = (expert[..., None] == jnp.arange(self.num_experts)) & chosen[..., None]
        row_load = hits.astype(dtype).sum((1, 2))
        load = row_load.sum(0)
        sums = {
            'load': load,
            'dropped': (chosen & ~kept).astype(dtype).sum(),
            'assignments': load.sum(),
            'routed': real.sum(),
        }
        zero = jnp.zeros((), dtype)
        if logits is None:
            return dict.fromkeys(('loss', 'balance', 'z', 'entropy'), zero) | sums
        scores = self.scores(logits)
        shares = scores / scores.sum(-1, keepdims=True) if self.config.score == 'sigmoid' else scores
        row_share = jnp.einsum('BS,BSE->BE', real, shares)
        count = jnp.maximum(real.sum(1), 1)
        used = jnp.maximum(row_load.sum(-1), 1)
        unevenness = self.num_experts * jnp.einsum('BE,BE->B', row_load, row_share) / (used * count)
        balance = jnp.sum(weights.sum(1) * unevenness)
        z = jnp.sum(weights * jnp.square(jax.nn.logsumexp(logits, axis=-1)))
        loss = self.config.balance_loss * balance + self.config.z_loss * z
        if self.bias is not None:
            # Linear in the bias, with the load's excess as its slope, and zero: the gradient that the bias gets is the
            # excess summed over the batch, whatever cuts the batch up. In whole numbers, so that a tie stays one.
            excess = jax.lax.stop_gradient(self.num_experts * load - load.sum())
            bias = self.bias[...].astype(dtype)
            loss = loss + jnp.sum((bias - jax.lax.stop_gradient(bias)) * excess)
        entropy = -jnp.sum(real[..., None] * shares * jnp.log(jnp.maximum(shares, 1e-30)))
        rest = jax.lax.stop_gradient({'balance': balance, 'z': z, 'entropy': entropy, **sums})
        return {'loss': loss, **rest}


def token_weights(x: jax.Array, context: Context, dtype: Any) -> jax.Array:
    """[B, S] what each token of x [B, S, ...] counts for: 0 on padding, else 1 if the context does not say."""
    if context.token_weights is not None:
        return context.token_weights.astype(dtype)
    if context.segment_ids is not None:
        return (context.segment_ids > 0).astype(dtype)
    return jnp.ones(x.shape[:2], dtype)


def _in_order(x: jax.Array, token_index: jax.Array | None) -> jax.Array:
    """Tokens [B, S, ...] by their index in the row."""
    return x if token_index is None else jnp.take(x, jnp.argsort(token_index), axis=1)


def _as_laid_out(x: jax.Array, token_index: jax.Array | None) -> jax.Array:
    """The inverse of `_in_order`."""
    return x if token_index is None else jnp.take(x, token_index, axis=1)


def _within_capacity(
    expert: jax.Array, chosen: jax.Array, capacity: Capacity, num_experts: int, token_index: jax.Array | None
) -> jax.Array:
    """Which choices [B, S, C] an expert has room for: first choices go first, then earlier tokens (GShard, alg. 1)."""
    batch, length, columns = expert.shape
    size, most = capacity.group(length), capacity.tokens(length, columns, num_experts)
    key = _in_order(jnp.where(chosen, expert, num_experts), token_index)
    key = key.reshape(batch, length // size, size, columns).swapaxes(2, 3).reshape(batch, -1, size * columns)
    hits = (key[..., None] == jnp.arange(num_experts)).astype(jnp.int32)
    before = jnp.cumsum(hits, axis=2) - hits
    rank = jnp.take_along_axis(before, jnp.minimum(key, num_experts - 1)[..., None], axis=-1)[..., 0]
    kept = (rank < most).reshape(batch, -1, columns, size).swapaxes(2, 3).reshape(batch, length, columns)
    return _as_laid_out(kept, token_index) & chosen
