"""What the names of gin files stand for: each file sees the modules that it imports itself, as in Python.

This is gin's dynamic registration (`from __gin__ import dynamic_registration`), without its global registry: classes
are used as they are, not wrapped, so configs made from gin and in Python are equal. Bindings on the command line see
the imports of all files.
"""

import dataclasses
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterable
from types import FunctionType, ModuleType
from typing import TypeGuard

from llm.configuration import suggesting
from llm.configuration.parsing import COMMAND_LINE, Import, Location
from llm.errors import UserError

_DYNAMIC_REGISTRATION = '__gin__.dynamic_registration'


class Symbols:
    """The imported names of every file, and the configurables found through them."""

    def __init__(self, imports: Iterable[Import]):
        """Performs `imports`.

        Raises:
            UserError: a module does not exist. An error inside an existing module is a bug and passes through.
        """
        self._tables: dict[str, dict[str, ModuleType]] = {}
        dynamic = {COMMAND_LINE}
        for statement in imports:
            file, where = statement.location.file, str(statement.location)
            table = self._tables.setdefault(file, {})
            if statement.module.startswith('__gin__.'):
                if statement.module != _DYNAMIC_REGISTRATION:
                    fix = 'Did you mean from __gin__ import dynamic_registration?'
                    raise UserError(f'gin has no feature {statement.module}', where=where, fix=fix)
                dynamic.add(file)
                continue
            if file not in dynamic:
                fix = 'Write from __gin__ import dynamic_registration above it.'
                raise UserError('the first import is not that of dynamic registration', where=where, fix=fix)
            if statement.name == 'gin':
                raise UserError('the name gin is taken by gin itself', where=where, fix='Import it as another name.')
            module = _import(statement)
            if table.setdefault(statement.name, module) is not module:
                what = f'{statement.name} is already {table[statement.name].__name__} in this file'
                raise UserError(what, where=where, fix=f'Import it as another name: {statement.module} as ...')

    def find_config(self, selector: str, location: Location) -> type:
        """The frozen dataclass that `selector` names in the file of `location`.

        Raises:
            UserError: there is none.
        """
        found = self._find(selector, location)
        if is_config(found):
            return found
        if isinstance(found, ModuleType):
            what, fix = f'{selector} is a module', suggesting.listing(_configs_in(found, selector))
        elif dataclasses.is_dataclass(found) and isinstance(found, type):
            what, fix = f'{selector} is a dataclass that is not frozen', 'gin binds frozen dataclasses only.'
        else:
            what, fix = f'{selector} is {_kind(found)}', 'gin binds frozen dataclasses only.'
        raise UserError(what, where=str(location), fix=fix)

    def find_function(self, selector: str, location: Location) -> FunctionType:
        """The function that `selector` names in the file of `location`.

        Raises:
            UserError: there is none.
        """
        found = self._find(selector, location)
        if isinstance(found, FunctionType):
            return found
        fix = f'Did you mean @{selector}()?' if is_config(found) else ''
        raise UserError(f'@{selector} without () is {_kind(found)}, not a function', where=str(location), fix=fix)

    def _find(self, selector: str, location: Location) -> object:
        root, *attributes = selector.split('.')
        found: object = self._module(root, selector, location)
        path = root
        for attribute in attributes:
            try:
                found = getattr(found, attribute)
            except AttributeError:
                candidates = _configs_in(found, path)
                raise UserError(
                    f'{path} has no {attribute}',
                    where=str(location),
                    fix=suggesting.nearest(f'{path}.{attribute}', candidates),
                ) from None
            path = f'{path}.{attribute}'
        return found

    def _module(self, name: str, selector: str, location: Location) -> ModuleType:
        table = self._tables.get(location.file, {})
        if name in table:
            return table[name]
        everywhere = {module.__name__: module for other in self._tables.values() if (module := other.get(name))}
        if location.file == COMMAND_LINE and everywhere:
            if len(everywhere) > 1:
                what = f'{name} is {" in one gin file and ".join(sorted(everywhere))} in another'
                fix = f"Say which: {COMMAND_LINE}='from ... import {name} as mine' and use mine."
                raise UserError(what, where=str(location), fix=fix)
            return next(iter(everywhere.values()))
        visible = self._tables if location.file == COMMAND_LINE else {location.file: table}
        names = [n for symbols in visible.values() for prefix, m in symbols.items() for n in _configs_in(m, prefix)]
        same_class = [n for n in names if n.rpartition('.')[2] == selector.rpartition('.')[2]]
        if everywhere:
            fix = f'Add an import of {next(iter(everywhere))} to it.'
        else:
            fix = suggesting.nearest(selector, same_class or names)
        importer = 'by any gin file' if location.file == COMMAND_LINE else 'in this file'
        raise UserError(f'{name} is not imported {importer}', where=str(location), fix=fix)


def is_config(value: object) -> TypeGuard[type]:
    """Whether `value` is a frozen dataclass (the class, not an instance)."""
    return isinstance(value, type) and dataclasses.is_dataclass(value) and value.__dataclass_params__.frozen  # type: ignore[attr-defined]


def _configs_in(found: object, prefix: str) -> list[str]:
    """Names under `prefix` of the configs that the module `found`, or a module inside it, defines."""
    if not isinstance(found, ModuleType):
        return []
    return [
        f'{prefix}.{name}'
        for name, value in vars(found).items()
        if is_config(value) and f'{value.__module__}.'.startswith(f'{found.__name__}.')
    ]


def _kind(found: object) -> str:
    if isinstance(found, ModuleType):
        return 'a module'
    if isinstance(found, type):
        return 'a class' if not is_config(found) else 'a dataclass'
    return 'a function' if inspect.isroutine(found) else f'a value of type {type(found).__name__}'


def _import(statement: Import) -> ModuleType:
    try:
        module = importlib.import_module(statement.module)
    except ModuleNotFoundError as error:
        missing = error.name or ''
        if missing != statement.module and not statement.module.startswith(f'{missing}.'):
            raise  # the module exists and imports something that does not: a bug there, or a missing dependency
        raise UserError(
            f'there is no module {missing}', where=str(statement.location), fix=_import_fix(statement, missing)
        ) from None
    return sys.modules[statement.module.partition('.')[0]] if statement.binds_root else module


def _import_fix(statement: Import, missing: str) -> str:
    package, _, name = missing.rpartition('.')
    parent = sys.modules.get(package)
    if hasattr(parent, name):  # gin imports modules; users expect classes, too
        return f'gin imports modules only: import {package} and write {package.rpartition(".")[2]}.{name}.'
    path = getattr(parent, '__path__', None) if package else None
    if package and path is None:
        return f'{package} is a module, not a package.'
    prefix = f'{package}.' if package else ''
    return suggesting.nearest(missing, [prefix + module.name for module in pkgutil.iter_modules(path)])
