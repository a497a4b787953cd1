import dataclasses
import json
from collections.abc import Callable
from typing import Literal

from gin_samples.models import Decoder, Layer, relu
from gin_samples.other.models import Teacher
from llm.configuration import Invocation
from llm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Train:
    """A job that prints what it was given, or fails as `failure` says."""

    model: Decoder
    steps: int
    files: str | tuple[str, ...] = ()
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    number: float | int = 0
    draft: Decoder | None = None
    teacher: Teacher = Teacher()
    layers: list[Layer] = dataclasses.field(default_factory=list)
    activation: Callable[[float], float] = relu
    failure: Literal['none', 'user', 'bug', 'interrupt'] = 'none'

    def __call__(self, invocation: Invocation) -> None:
        match self.failure:
            case 'user':
                raise UserError('the disk\nis full', where='/data', fix='Free some space.')
            case 'bug':
                raise ZeroDivisionError('a bug')
            case 'interrupt':
                raise KeyboardInterrupt
        print(json.dumps({'steps': self.steps, **dataclasses.asdict(invocation)}))


@dataclasses.dataclass(frozen=True)
class Nested:
    """A job that may hold another, so that its class occurs twice."""

    inner: 'Nested | None' = None
    steps: int = 1

    def __call__(self, invocation: Invocation) -> None:
        del invocation
