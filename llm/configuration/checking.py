"""Values against the type annotations of dataclass fields.

Allowed annotations: bool, int, float, str, None, Literal, tuple, list, dict, unions of these, Callable (a reference to
a function), and classes, of which the value must be an instance. An int is accepted for a float and a list for a
tuple, and converted; a bool is not an int.
"""

import collections.abc
import dataclasses
import functools
import types
import typing
from typing import Any, Literal, Union

from llm.configuration import suggesting
from llm.configuration.parsing import shorten


class MismatchError(Exception):
    """A value that its annotation does not allow.

    Attributes:
        expected: the annotation at fault, in words.
        got: the value at fault, which may be inside the whole value.
        path: indices and keys that lead to it.
        hint: what to write, if that is clear.
    """

    def __init__(self, expected: str, got: object, path: tuple[object, ...] = (), hint: str = ''):
        self.expected, self.got, self.path, self.hint = expected, got, path, hint
        super().__init__(expected, got, path, hint)


@functools.cache
def parameters(cls: type) -> dict[str, Any]:
    """Annotation of each field that the constructor of the dataclass `cls` takes, in order."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def has_default(cls: type, parameter: str) -> bool:
    """Whether the field called `parameter` of the dataclass `cls` has a default."""
    field = next(field for field in dataclasses.fields(cls) if field.name == parameter)
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def coerce(value: object, annotation: Any) -> Any:
    """`value` as `annotation` wants it.

    Raises:
        MismatchError: the annotation does not allow the value.
    """
    origin = typing.get_origin(annotation) or annotation
    if origin in (Union, types.UnionType):
        return _coerce_union(value, annotation)
    if origin is Literal:
        return _coerce_literal(value, annotation)
    if origin in (tuple, list):
        return _coerce_sequence(value, annotation, origin)
    if origin is dict:
        return _coerce_dict(value, annotation)
    if origin is collections.abc.Callable:
        allowed = isinstance(value, types.FunctionType)
    elif origin in (None, types.NoneType):
        allowed = value is None
    elif origin is float:
        allowed = type(value) in (int, float)
    elif origin in (bool, int, str):
        allowed = type(value) is origin
    else:  # a config class, or a base class of some
        allowed = isinstance(origin, type) and dataclasses.is_dataclass(value) and isinstance(value, origin)
    if not allowed:
        raise MismatchError(describe(annotation), value, hint=_hint(value, origin))
    if origin is float:
        try:
            return float(value)  # type: ignore[arg-type]
        except OverflowError:
            raise MismatchError('float', value, hint='It is too large.') from None
    return value


def describe(annotation: Any) -> str:
    """`annotation` in a user's words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return ' or '.join(describe(argument) for argument in arguments)
    if origin is Literal:
        return ' or '.join(map(repr, arguments))
    if origin is collections.abc.Callable:
        return 'a function'
    if origin and arguments:
        inner = ', '.join('...' if argument is Ellipsis else describe(argument) for argument in arguments)
        return f'{origin.__name__}[{inner}]'
    if annotation in (None, types.NoneType):
        return 'None'
    return getattr(annotation, '__name__', str(annotation))


def show(value: object) -> str:
    """`value` and its type, for a message."""
    if dataclasses.is_dataclass(value):
        return f'a {type(value).__name__}'
    if isinstance(value, types.FunctionType):
        return f'the function {value.__name__}'
    return f'{shorten(repr(value))} ({type(value).__name__})' if value is not None else 'None'


def _coerce_union(value: object, annotation: Any) -> Any:
    accepted, failures = [], []
    members = typing.get_args(annotation)
    for member in members:
        try:
            accepted.append(coerce(value, member))
        except MismatchError as failure:
            failures.append(failure)
    if accepted:
        # Of `float | int`, 3 is the int: what needs no conversion comes first.
        return next((result for result in accepted if type(result) is type(value)), accepted[0])
    inside = [failure for failure in failures if failure.path]
    if len(inside) == 1:  # one member fits but for something inside: name that
        raise inside[0]
    hint = next((failure.hint for failure in failures if failure.hint), '')
    raise MismatchError(describe(annotation), value, hint=hint)


def _coerce_literal(value: object, annotation: Any) -> Any:
    choices = typing.get_args(annotation)
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        match = (
            suggesting.closest(value, [c for c in choices if isinstance(c, str)]) if isinstance(value, str) else None
        )
        raise MismatchError(describe(annotation), value, hint=f'Did you mean {match!r}?' if match else '')
    return value


def _coerce_sequence(value: object, annotation: Any, kind: type) -> Any:
    if not isinstance(value, list | tuple):
        raise MismatchError(describe(annotation), value, hint=_wrapping_hint(value, annotation, kind))
    arguments = typing.get_args(annotation)
    if kind is tuple and Ellipsis not in arguments:  # each element has its own type
        if len(value) != len(arguments):
            raise MismatchError(describe(annotation), value, hint=f'It takes {len(arguments)} elements.')
    else:
        arguments = arguments[:1] * len(value)
    if len(arguments) != len(value):
        raise MismatchError(f'{describe(annotation)} (whose elements have no type)', value)
    return kind(_at(index, item, argument) for index, (item, argument) in enumerate(zip(value, arguments, strict=True)))


def _coerce_dict(value: object, annotation: Any) -> Any:
    if not isinstance(value, dict) or not typing.get_args(annotation):
        raise MismatchError(describe(annotation), value)
    key_type, item_type = typing.get_args(annotation)
    return {_at(key, key, key_type): _at(key, item, item_type) for key, item in value.items()}


def _at(position: object, value: object, annotation: Any) -> Any:
    try:
        return coerce(value, annotation)
    except MismatchError as inner:
        raise MismatchError(inner.expected, inner.got, (position, *inner.path), inner.hint) from None


def _wrapping_hint(value: object, annotation: Any, kind: type) -> str:
    """What to write instead of a single element, if `value` is one."""
    try:
        coerce(kind([value]), annotation)
    except MismatchError:
        return ''
    if dataclasses.is_dataclass(value) or isinstance(value, types.FunctionType):
        return f'Write {"(@...,)" if kind is tuple else "[@...]"} for one.'
    return f'Write {shorten(repr(kind([value])))} for one.'


def _hint(value: object, wanted: Any) -> str:
    """What to write instead of a literal of the wrong type, if that is clear."""
    if isinstance(value, str) and wanted in (int, float):
        try:
            float(value)
        except ValueError:
            return ''
        return 'Write it without quotes.'
    if wanted is bool and value in ('True', 'False'):
        return 'Write it without quotes.'
    if wanted is str and isinstance(value, int | float):
        return 'Write it in quotes.'
    if wanted is int and isinstance(value, float) and value.is_integer():
        return f'Write {int(value)}.'
    return ''


def mentions(annotation: Any, cls: type) -> bool:
    """Whether `annotation` is `cls`, a base class of it, or has one inside."""
    arguments = typing.get_args(annotation)
    if arguments and typing.get_origin(annotation) is not Literal:
        return any(mentions(argument, cls) for argument in arguments)
    return isinstance(annotation, type) and annotation is not object and _is_base(cls, annotation)


def _is_base(cls: type, annotation: type) -> bool:
    try:
        return issubclass(cls, annotation)
    except TypeError:  # a protocol that has attributes
        has = {*dir(cls), *getattr(cls, '__dataclass_fields__', ())}
        return all(name in has for name in vars(annotation) if not name.startswith('_'))
