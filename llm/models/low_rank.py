"""Low-rank adaptation: matrices stay as they are, and what is trained is a product of two thin ones beside each.

LoRA (Hu et al. 2022, eq. 3): W becomes W + alpha / rank * down up, with `down` drawn at random and `up` zero, so that
training starts from the model that is adapted. `adapt` puts a module where a parameter was, so scans, pipelines,
sharding and checkpoints see three parameters, `query/base`, `query/down` and `query/up`, and need to know nothing.

    decoder = Decoder(config)
    adapt(decoder, LowRankConfig(rank=8))
    parameters = attach(base_parameters, initialize(parameter_specs(decoder), ...))
    plain = merge(trained, config)               # as the decoder has them without adapters
"""

import dataclasses
import string
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm.errors import UserError
from llm.models.parameters import ParameterSpec, Role, declare

_BASE, _DOWN, _UP = 'base', 'down', 'up'
ReadPiece = Callable[[str, tuple[int | slice, ...]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class LowRankConfig:
    """Which matrices are adapted, and how.

    Attributes:
        rank: columns of `down` and rows of `up`.
        alpha: the product is scaled by alpha / rank; None for alpha = rank, a factor of 1.
        targets: names of the parameters that get adapters, as the dry run prints them last in a path; all matrices
            between hidden spaces if empty.
        train_rest: whether parameters without adapters are trained too.
    """

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ()
    train_rest: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f'rank is {self.rank}', where='LowRankConfig', fix='Use at least 1.')
        if self.alpha is not None and self.alpha <= 0:
            raise UserError(f'alpha is {self.alpha}', where='LowRankConfig', fix='Use a positive number, or None.')

    @property
    def scale(self) -> float:
        """Factor on the product."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class LowRank(nnx.Module):
    """A parameter W that reads as W + scale * down up; its dimensions are those of W."""

    def __init__(self, spec: ParameterSpec, config: LowRankConfig) -> None:
        self.scale = config.scale
        self.equation = _equation(spec)
        self.base = declare(dataclasses.replace(spec, trainable=False))
        down, up = _factors(spec, config.rank)
        self.down, self.up = declare(down), declare(up)

    def __getitem__(self, index: Any) -> jax.Array:
        base = self.base[...]
        return _effective(base, self.down[...], self.up[...], self.equation, self.scale)[index]


def _effective(base: Any, down: Any, up: Any, equation: str, scale: float) -> Any:
    return base + (scale * jnp.einsum(equation, down, up)).astype(base.dtype)


def _batch(spec: ParameterSpec) -> tuple[int, ...]:
    """Dimensions over which matrices repeat: layers, experts. They come first; a layer of a stack is without them."""
    return tuple(i for i in range(len(spec.shape)) if i not in spec.inputs + spec.outputs)


def _equation(spec: ParameterSpec) -> str:
    """Of the product: '...by,...ycd->...bcd' for W [L, D, H, K], b being the input, y the rank."""
    letters = string.ascii_lowercase[: len(spec.shape)]
    inputs, outputs = (''.join(letters[i] for i in part) for part in (spec.inputs, spec.outputs))
    return f'...{inputs}y,...y{outputs}->...{letters[len(_batch(spec)) :]}'


def _factors(spec: ParameterSpec, rank: int) -> tuple[ParameterSpec, ParameterSpec]:
    def of(dimensions: tuple[int | None, ...], inputs: tuple[int, ...], outputs: tuple[int, ...]) -> ParameterSpec:
        return ParameterSpec(
            tuple(rank if i is None else spec.shape[i] for i in dimensions),
            tuple('rank' if i is None else spec.axes[i] for i in dimensions),
            Role.HIDDEN,
            inputs=inputs,
            outputs=outputs,
        )

    first = len(_batch(spec))
    wide, narrow = len(spec.inputs), len(spec.outputs)
    down = of((*_batch(spec), *spec.inputs, None), tuple(range(first, first + wide)), (first + wide,))
    up = of((*_batch(spec), None, *spec.outputs), (first,), tuple(range(first + 1, first + 1 + narrow)))
    return down, dataclasses.replace(up, constant=0.0)


def adapt(model: nnx.Module, config: LowRankConfig, new: tuple[nnx.Module | None, ...] = ()) -> None:
    """Put adapters beside the matrices that `config` names, in place; they alone are trained.

    Args:
        new: parts of the model that begin afresh, and so are trained as they are.

    Raises:
        UserError: a target is no matrix between hidden spaces of this model.
    """
    found: set[str] = set()
    matrices: set[str] = set()
    whole = {id(part) for module in new if module is not None for _, part in nnx.iter_modules(module)}
    for _, part in list(nnx.iter_modules(model)):
        if id(part) in whole:
            continue
        for name, value in list(vars(part).items()):
            if not isinstance(value, nnx.Param):
                continue
            spec: ParameterSpec = value.get_metadata('spec')
            adaptable = spec.role is Role.HIDDEN and bool(spec.inputs) and bool(spec.outputs)
            matrices.update([name] * adaptable)
            if adaptable and (not config.targets or name in config.targets):
                found.add(name)
                setattr(part, name, LowRank(spec, config))
            elif not config.train_rest:
                setattr(part, name, declare(dataclasses.replace(spec, trainable=False)))
    if missing := sorted(set(config.targets) - found):
        raise UserError(
            f'no matrix of the model is called {", ".join(map(repr, missing))}',
            where='LowRankConfig.targets',
            fix=f'Use some of {", ".join(sorted(matrices))}.',
        )


def _is_adapted(tree: Any) -> bool:
    return isinstance(tree, dict) and set(tree) == {_BASE, _DOWN, _UP}


def attach(base: Any, adapted: Any) -> Any:
    """Parameters of an adapted model: those of `base` in their places, the adapters as they are in `adapted`."""
    if _is_adapted(adapted):
        return {**adapted, _BASE: base}
    return {name: attach(base[name], part) for name, part in adapted.items()} if isinstance(adapted, dict) else base


def merge(parameters: Any, specs: Any, config: LowRankConfig) -> Any:
    """Parameters of the model without adapters, which computes the same.

    Args:
        parameters: nested dict of arrays of the adapted model. specs: nested dict of ParameterSpec of that model.
    """
    if _is_adapted(parameters):
        base, down, up = (parameters[name] for name in (_BASE, _DOWN, _UP))
        return _effective(base, down, up, _equation(specs[_BASE]), config.scale)
    if isinstance(parameters, dict):
        return {name: merge(part, specs[name], config) for name, part in parameters.items()}
    return parameters


def merging_reader(read: ReadPiece, specs: Mapping[str, ParameterSpec], config: LowRankConfig) -> ReadPiece:
    """`merge` for parameters that are read a piece at a time.

    Args:
        read: gives a slice of a parameter of the adapted model, by path.
        specs: of that model, by path.

    Returns:
        What gives a slice of a parameter of the model without adapters.
    """

    def merged(path: str, index: tuple[int | slice, ...]) -> np.ndarray:
        spec = specs.get(f'{path}/{_BASE}')
        if spec is None:
            return read(path, index)
        batch = len(_batch(spec))
        matrices, within = index[:batch], index[batch:]
        down, up = (jnp.asarray(read(f'{path}/{name}', matrices)) for name in (_DOWN, _UP))
        base = jnp.asarray(read(f'{path}/{_BASE}', matrices))
        whole = np.asarray(_effective(base, down, up, _equation(spec), config.scale))
        kept = sum(isinstance(each, slice) for each in matrices) + batch - len(matrices)
        return whole[(slice(None),) * kept + within]

    return merged
