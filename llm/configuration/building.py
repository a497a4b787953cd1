"""From the tree of values to nested frozen dataclasses, every field checked against its annotation."""

import dataclasses
import re
from typing import Any

from llm.configuration import checking
from llm.configuration.resolving import Instance, Value
from llm.errors import UserError


class Builder:
    """Makes the config of each Instance once, however many references lead to it."""

    def __init__(self) -> None:
        self._built: dict[int, Any] = {}

    def build(self, value: Value) -> Any:
        """The Python value that `value` stands for.

        Raises:
            UserError: a field is missing or of the wrong type, or a config refuses its values.
        """
        content = value.content
        if isinstance(content, list | tuple):
            return type(content)([self.build(item) for item in content])
        if isinstance(content, dict):
            return {key: self.build(item) for key, item in content.items()}
        if not isinstance(content, Instance):
            return content
        if id(content) not in self._built:
            self._built[id(content)] = self._make(content)
        return self._built[id(content)]

    def _make(self, instance: Instance) -> Any:
        annotations = checking.parameters(instance.cls)
        for parameter, annotation in annotations.items():
            if parameter not in instance.fields and not checking.has_default(instance.cls, parameter):
                raise UserError(
                    f'{instance.name}.{parameter} is not set and has no default',
                    where=str(instance.setting.location),
                    fix=f'Write {instance.name}.{parameter} = {_example(annotation)}.',
                )
        arguments = {}
        for parameter, value in instance.fields.items():
            try:
                arguments[parameter] = checking.coerce(self.build(value), annotations[parameter])
            except checking.MismatchError as mismatch:
                raise _ill_typed(f'{instance.name}.{parameter}', value, mismatch) from None
        try:
            return instance.cls(**arguments)
        except UserError as error:
            if error.where:
                raise
            raise UserError(error.what, where=_blame(instance, error.what), fix=error.fix) from error


def _ill_typed(name: str, value: Value, mismatch: checking.MismatchError) -> UserError:
    for step in mismatch.path:  # to the setting that wrote the element at fault
        if not isinstance(value.content, list | tuple | dict):
            break
        value = value.content[step]  # type: ignore[call-overload]
    position = ''.join(f'[{step!r}]' for step in mismatch.path)
    what = f'{name}{position} takes {mismatch.expected}, not {checking.show(mismatch.got)}'
    if value.setting.is_macro:
        what = f'{what}, from %{value.setting.name}'
    return UserError(what, where=str(value.setting.location), fix=mismatch.hint)


def _blame(instance: Instance, what: str) -> str:
    """Where the first setting stands whose field `what` speaks of; else where the config is referred to."""
    for name, value in instance.fields.items():
        if re.search(rf'\b{re.escape(name)}\b', what):
            return str(value.setting.location)
    return str(instance.setting.location)


def _example(annotation: Any) -> str:
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return f'@{annotation.__module__.rpartition(".")[2]}.{annotation.__qualname__}()'
    return f'a value of type {checking.describe(annotation)}' if not checking.mentions(annotation, str) else "'...'"
