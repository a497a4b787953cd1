import dataclasses
from typing import Any, Literal

from llm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Norm:
    kind: Literal['rms', 'layer'] = 'rms'
    epsilon: float = 1e-6


@dataclasses.dataclass(frozen=True)
class Layer:
    window: int | None = None
    norm: Norm = Norm()
    bias: bool = False

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise UserError(f'window {self.window} is not positive', fix='Use 1 or more.')


@dataclasses.dataclass(frozen=True)
class Decoder:
    num_layers: int
    pattern: tuple[Layer, ...] = (Layer(),)
    dropout: float = 0  # an int, as people write it
    name: str = 'decoder'
    shape: tuple[int, float, str] = (1, 2.0, 'three')
    norm: Norm | None = None


@dataclasses.dataclass(frozen=True)
class Untyped:
    anything: Any = None


@dataclasses.dataclass(frozen=True)
class Growing:
    """A bug: reading what was written makes another value."""

    size: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, 'size', self.size + 1)

    def __call__(self, invocation: object) -> None:
        del invocation


@dataclasses.dataclass
class Thawed:
    size: int = 1


def relu(x: float) -> float:
    return max(x, 0.0)


NOT_A_CLASS = 3
