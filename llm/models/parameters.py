"""How a parameter is declared, and the table of declarations that everything else reads.

A module declares its parameters with `parameter` and holds shapes only; values come from
`llm.models.initialization`. `parameter_specs` takes the declarations out as a nested dict that mirrors the nested
dict of arrays: sharding, initialisation, muP, weight-decay masks and optimizers read that table and never match names.
"""

import dataclasses
import enum
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

# Distributions of their own, the same under every scheme; see llm.models.initialization.STARTS.
Start = Literal['uniform', 'time_step', 'log_range', 'log_uniform']


class Role(enum.Enum):
    """What a parameter does, as muP tells them apart (Yang et al. 2022, Tensor Programs V, table 8)."""

    EMBEDDING = 'embedding'  # from a finite axis (vocabulary, positions) to width
    HIDDEN = 'hidden'  # from width to width
    OUTPUT = 'output'  # from width to a finite axis
    ROUTER = 'router'  # the same inside the model: no multiplier stands behind it
    VECTOR = 'vector'  # scales, biases: one axis of width, or none


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
    """The declaration of one parameter.

    Attributes:
        shape: sizes, including the leading repeat axis of stacked layers.
        axes: logical axis of each dimension; as many as `shape` has.
        role: see Role.
        inputs: dimensions that are fan-in; outputs: dimensions that are fan-out. The rest (layers, experts) are batch.
        residual: whether the output is added to the residual stream (GPT-2 and T-Fixup scale these).
        branch: whether it stands before a residual one on a path that no softmax cuts: value, gate and up projections,
            not queries and keys (T-Fixup scales these too).
        gain: factor on the standard deviation under 't5', whose factors are of one layer or model.
        constant: initial value of every element; None draws at random.
        start: the distribution to draw from where it is not the scheme's.
        full_precision: whether it is used as it is stored, whatever the model computes in.
        sign_rate: no optimizer moves it, but this, against the sign of its gradient; None for an ordinary parameter.
        trainable: whether training changes it; others have no gradient and no optimizer state.
        below: whether it stands before the first layer, as embeddings do, which need not say so.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    role: Role
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    residual: bool = False
    branch: bool = False
    gain: float = 1.0
    constant: float | None = None
    start: Start | None = None
    full_precision: bool = False
    sign_rate: float | None = None
    trainable: bool = True
    below: bool = False

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f'shape {self.shape} and axes {self.axes} differ in length')

    @property
    def fan_in(self) -> int:
        """Product of the input dimensions; 1 if there are none."""
        return math.prod(self.shape[i] for i in self.inputs)

    @property
    def fan_out(self) -> int:
        """Product of the output dimensions; 1 if there are none."""
        return math.prod(self.shape[i] for i in self.outputs)

    def stacked(self, size: int, axis: str) -> 'ParameterSpec':
        """The spec of `size` such parameters along a new leading axis."""
        return dataclasses.replace(
            self,
            shape=(size, *self.shape),
            axes=(axis, *self.axes),
            inputs=tuple(i + 1 for i in self.inputs),
            outputs=tuple(i + 1 for i in self.outputs),
        )


def declare(spec: ParameterSpec) -> nnx.Param:
    """A parameter with this spec, of a shape without values."""
    return nnx.Param(jax.ShapeDtypeStruct(spec.shape, jnp.float32), spec=spec, eager_sharding=False)


def parameter(
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    role: Role,
    *,
    inputs: tuple[int, ...] = (),
    outputs: tuple[int, ...] = (),
    residual: bool = False,
    branch: bool = False,
    gain: float = 1.0,
    constant: float | None = None,
    start: Start | None = None,
    full_precision: bool = False,
    sign_rate: float | None = None,
) -> nnx.Param:
    """Declare a parameter inside a module; see ParameterSpec. It holds a shape, not values."""
    return declare(
        ParameterSpec(
            tuple(shape),
            tuple(axes),
            role,
            inputs,
            outputs,
            residual=residual,
            branch=branch,
            gain=gain,
            constant=constant,
            start=start,
            full_precision=full_precision,
            sign_rate=sign_rate,
        )
    )


def bias(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """Declare a bias that starts at zero."""
    return parameter(shape, axes, Role.VECTOR, outputs=tuple(range(len(shape))), constant=0.0)


def stack(module: nnx.Module, size: int, axis: str = 'layers') -> nnx.Module:
    """`module` with every parameter repeated `size` times along a new leading axis, in place."""
    for _, part in nnx.iter_modules(module):
        for name, value in list(vars(part).items()):
            if isinstance(value, nnx.Param):
                setattr(part, name, declare(value.get_metadata('spec').stacked(size, axis)))
    return module


def mark_below(module: nnx.Module, names: tuple[str, ...]) -> None:
    """Declare what `module` has by these names, a parameter or a part, to stand below its layers; in place."""
    for name in names:
        value = getattr(module, name)
        if isinstance(value, nnx.Param):
            setattr(module, name, declare(dataclasses.replace(value.get_metadata('spec'), below=True)))
        elif isinstance(value, nnx.Module):
            mark_below(value, tuple(part for part, each in vars(value).items() if isinstance(each, nnx.Param)))


def parameter_specs(module: nnx.Module) -> dict[str, Any]:
    """Nested dict of ParameterSpec with the structure of the nested dict of the module's arrays."""
    specs: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        node = specs
        for key in path[:-1]:
            node = node.setdefault(str(key), {})
        node[str(path[-1])] = variable.get_metadata('spec')
    return specs


def named_specs(specs: dict[str, Any]) -> list[tuple[str, ParameterSpec]]:
    """The table as a list, by name: ('layers/0/mixer/query', spec), ..."""
    return [
        ('/'.join(str(part.key) for part in path), spec) for path, spec in jax.tree_util.tree_leaves_with_path(specs)
    ]


def count_parameters(specs: dict[str, Any]) -> int:
    """Number of scalars in all parameters of the table."""
    return sum(math.prod(spec.shape) for _, spec in named_specs(specs))
