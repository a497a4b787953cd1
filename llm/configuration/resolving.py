"""From statements to the tree of values that the macro JOB reaches, with gin's rules for scopes and macros.

`@train/Foo()` takes its fields from `Foo.x = ...` and over these from `train/Foo.x = ...`; references inside it without
a scope of their own are in scope `train`, too. `%NAME` puts what it stands for in scope `NAME`. What is set last wins.
Every setting that the tree does not use is an error, as is every name that means nothing.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from llm.configuration import checking, suggesting
from llm.configuration.importing import Symbols
from llm.configuration.parsing import (
    COMMAND_LINE,
    REQUIRED,
    Block,
    Import,
    Macro,
    Reference,
    Setting,
    Statement,
    references,
    shorten,
)
from llm.errors import UserError

JOB = 'JOB'
_BUILT_IN = (JOB, REQUIRED.name)


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A value and the setting that wrote it.

    Attributes:
        content: a literal, a function, an Instance, REQUIRED, or a list, tuple or dict of Values.
        setting: the statement in which the content stands: that of the macro, for a macro's value.
    """

    content: Any
    setting: Setting


@dataclasses.dataclass(frozen=True, eq=False)
class Instance:
    """A config to be made.

    Attributes:
        cls: its class.
        name: the class as the reference spells it, with its scope.
        fields: what is set, in the order of the class.
        setting: the statement with the reference to it.
    """

    cls: type
    name: str
    fields: dict[str, Value]
    setting: Setting


_Key = tuple[str, type, str]  # scope, class, field


class Resolver:
    """Expands references and macros, and remembers what was used."""

    def __init__(self, statements: Sequence[Statement]):
        """Performs the imports and looks up every name in `statements`.

        Raises:
            UserError: a name means nothing, or one file sets the same thing twice.
        """
        self._symbols = Symbols(statement for statement in statements if isinstance(statement, Import))
        self._bindings: dict[_Key, Setting] = {}
        self._macros: dict[str, Setting] = {}
        self._replaced: list[Setting] = []  # settings that a later one of the same thing overrides
        for statement in statements:
            if isinstance(statement, Block):
                self._symbols.find_config(statement.selector, statement.location)
            elif isinstance(statement, Setting):
                self._set(statement)
        for setting in (*self._replaced, *self._macros.values(), *self._bindings.values()):
            self._check_references(setting)
        self._used: set[Setting] = set()
        self._consulted: set[_Key] = set()
        self._scopes: dict[type, set[str]] = {}  # classes in the tree, with the scopes they are in
        self._instances: dict[tuple[type, tuple[str, ...]], Instance] = {}
        self._active: list[object] = []

    def resolve(self) -> Value:
        """The value of JOB.

        Raises:
            UserError: JOB is not set, something refers to itself, or a setting is not used.
        """
        if JOB not in self._macros:
            fix = suggesting.closest(JOB, self._macros)
            raise UserError(
                'no gin file sets JOB, so nothing says what to run',
                fix=f'Did you mean JOB where {self._macros[fix].location} says {fix}?'
                if fix
                else 'Start from a run file in gin_configs/runs, or write JOB = @module.Job().',
            )
        tree = self._expand_macro(JOB)
        self._check_all_used()
        return tree

    def _set(self, setting: Setting) -> None:
        where = str(setting.location)
        if setting.is_macro:
            before = self._macros.get(setting.name)
            self._macros[setting.name] = setting
        else:
            cls = self._symbols.find_config(setting.selector, setting.location)
            if setting.parameter not in checking.parameters(cls):
                fix = suggesting.nearest(setting.parameter, checking.parameters(cls))
                raise UserError(f'{setting.selector} has no {setting.parameter}', where=where, fix=fix)
            key = (setting.scope, cls, setting.parameter)
            before = self._bindings.get(key)
            self._bindings[key] = setting
        if before is None:
            return
        self._replaced.append(before)
        same_file = before.location.file == setting.location.file != COMMAND_LINE
        if same_file and before.location.line != setting.location.line:  # the same line: a file included twice
            raise UserError(
                f'{setting.name} is already set in line {before.location.line} of this file',
                where=where,
                fix='Remove one of the two.',
            )

    def _check_references(self, setting: Setting) -> None:
        where = str(setting.location)
        for reference in references(setting.value):
            if isinstance(reference, Reference):
                if reference.evaluate:
                    self._symbols.find_config(reference.selector, setting.location)
                else:
                    self._symbols.find_function(reference.selector, setting.location)
            elif reference != REQUIRED and reference.name not in self._macros:
                fix = suggesting.nearest(reference.name, {*self._macros, REQUIRED.name} - {setting.name, JOB})
                raise UserError(f'{reference} is not set anywhere', where=where, fix=fix)

    def _expand_macro(self, name: str) -> Value:
        setting = self._macros[name]
        self._used.add(setting)
        return self._guard(
            Macro(name), setting, lambda: self._expand(setting.value, setting, scope=tuple(name.split('/')))
        )

    def _expand(self, value: object, setting: Setting, scope: tuple[str, ...]) -> Value:
        if isinstance(value, Macro) and value != REQUIRED:
            return self._expand_macro(value.name)
        content: object = value
        if isinstance(value, Reference):
            content = self._expand_reference(value, setting, scope)
        elif isinstance(value, list | tuple):
            content = type(value)([self._expand(item, setting, scope) for item in value])
        elif isinstance(value, dict):
            content = {key: self._expand(item, setting, scope) for key, item in value.items()}
        return Value(content, setting)

    def _expand_reference(self, reference: Reference, setting: Setting, scope: tuple[str, ...]) -> object:
        if not reference.evaluate:
            return self._symbols.find_function(reference.selector, setting.location)
        cls = self._symbols.find_config(reference.selector, setting.location)
        scope = reference.scope or scope
        key = (cls, scope)
        if key not in self._instances:
            name = '/'.join((*reference.scope, reference.selector))
            self._instances[key] = self._guard(
                key, setting, lambda: Instance(cls, name, self._expand_fields(cls, scope), setting)
            )
        return self._instances[key]

    def _expand_fields(self, cls: type, scope: tuple[str, ...]) -> dict[str, Value]:
        prefixes = ['/'.join(scope[:length]) for length in range(len(scope) + 1)]
        self._scopes.setdefault(cls, set()).add(prefixes[-1])
        fields = {}
        for name in checking.parameters(cls):
            keys = [key for prefix in prefixes if (key := (prefix, cls, name)) in self._bindings]
            self._consulted.update(keys)
            if keys:
                setting = self._bindings[keys[-1]]
                self._used.add(setting)
                fields[name] = self._expand(setting.value, setting, scope)
        return fields

    def _guard(self, key: object, setting: Setting, expand: Callable[[], Any]) -> Any:
        """The result of `expand`, unless it comes back to `key`."""
        if key in self._active:
            circle = [*self._active[self._active.index(key) :], key]
            steps = ' -> '.join(str(step) if isinstance(step, Macro) else f'@{step[0].__name__}()' for step in circle)  # type: ignore[index]
            raise UserError(f'circular: {steps}', where=str(setting.location), fix='Break the circle.')
        self._active.append(key)
        try:
            return expand()
        finally:
            self._active.pop()

    def _check_all_used(self) -> None:
        for key, setting in self._bindings.items():
            if key not in self._consulted:
                raise self._unused_binding(key, setting)
        asleep = [*self._replaced, *(s for s in self._bindings.values() if s not in self._used)]
        unused = {name: setting for name, setting in self._macros.items() if setting not in self._used}
        # A file may set a macro for a line of its own that another file overrides: that is no mistake.
        while excused := [
            name
            for name, setting in unused.items()
            if any(other.location.file == setting.location.file for other in _users(name, asleep))
        ]:
            asleep += [unused.pop(name) for name in excused]
        for name, setting in unused.items():
            raise self._unused_macro(name, setting, _users(name, asleep))

    def _unused_macro(self, name: str, setting: Setting, users: list[Setting]) -> UserError:
        what = f'{name} is set, but nothing that JOB needs refers to %{name}'
        if users:
            fix = f'{users[0].name} at {users[0].location} does, but is overridden.'
        else:
            match = suggesting.closest(name, set(self._macros) - set(_BUILT_IN))
            knobs = [other for other, value in self._macros.items() if value in self._used and other != JOB]
            fix = f'Did you mean {match}?' if match else 'Remove it, or refer to it.'
            if knobs and not match:
                fix = f'Its knobs are: {", ".join(knobs)}.'
        return UserError(what, where=str(setting.location), fix=fix)

    def _unused_binding(self, key: _Key, setting: Setting) -> UserError:
        scope, cls, _ = key
        where = str(setting.location)
        if cls in self._scopes:
            inside = sorted(self._scopes[cls] - {JOB})
            what = f'{setting.name} is set, but JOB uses no {setting.selector} in scope {scope}'
            match = suggesting.closest(scope, inside)
            fix = f'Did you mean {match}?' if match else f'Its scopes are: {", ".join(s or "none" for s in inside)}.'
            return UserError(what, where=where, fix=fix if inside else 'It is used without a scope.')
        holders = [
            f'{used.__module__.rpartition(".")[2]}.{used.__qualname__}.{field}'
            for used in self._scopes
            for field, annotation in checking.parameters(used).items()
            if checking.mentions(annotation, cls)
        ]
        fix = f'Write {holders[0]} = @{setting.selector}(), or remove it.' if holders else 'Remove it.'
        what = f'{setting.name} is set, but nothing that JOB needs refers to @{setting.selector}()'
        return UserError(what, where=where, fix=fix)


def check_required(tree: Value) -> None:
    """Checks that no value in `tree` is still `%gin.REQUIRED`.

    Raises:
        UserError: naming all that are, and how to set them.
    """
    missing: dict[Setting, bool] = {}  # whether the field takes text
    _find_required(tree, None, missing)
    if not missing:
        return
    names = [setting.name for setting in missing]
    first = next(iter(missing))
    example = ' '.join(
        f"""{COMMAND_LINE}='{setting.name}={'"..."' if text else '...'}'""" for setting, text in missing.items()
    )
    meaning = f' ({shorten(first.comment)})' if first.comment else ''
    what = f'{" and ".join(names)} must be set{meaning}'
    raise UserError(what, where=str(first.location), fix=f'Set {" and ".join(names)}: {example}')


def _find_required(value: Value, annotation: Any, missing: dict[Setting, bool]) -> None:
    content = value.content
    if content == REQUIRED:
        missing.setdefault(value.setting, checking.mentions(annotation, str))
    elif isinstance(content, Instance):
        for name, field in content.fields.items():
            _find_required(field, checking.parameters(content.cls)[name], missing)
    elif isinstance(content, list | tuple | dict):
        for item in content.values() if isinstance(content, dict) else content:
            _find_required(item, annotation, missing)


def _users(name: str, settings: Iterable[Setting]) -> list[Setting]:
    return [setting for setting in settings if Macro(name) in references(setting.value)]
