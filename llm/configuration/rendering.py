"""The operative config: a resolved job as one gin file that reads back as the same job.

It depends on the job alone, not on the files, macros and aliases that it came from, so equal jobs have equal texts. All
fields are written, defaults too: a later change of a default does not change what the file means. A class of which the
job holds one value is written without a scope; values that differ get the path from the job as scope.
"""

import dataclasses
import functools
import math
import sys
import types
from typing import Any

from llm.configuration import checking

_HEADER = """# The whole configuration of one run, defaults included; the run is repeated by
#   python -m llm.main --gin_file=<this file>
from __gin__ import dynamic_registration
"""


def render(job: Any) -> str:
    """`job`, a frozen dataclass instance, as gin text.

    Raises:
        TypeError: a field holds what gin cannot write: a bug in its class, since nothing from gin can.
    """
    return _Renderer(job).text()


class _Renderer:
    def __init__(self, job: Any):
        self._job = job
        self._scopes: dict[type, dict[str, str]] = {}  # for each class, the scope of each different value of it
        self._instances: list[Any] = []  # the different values, as first met
        self._keys: dict[int, str] = {}
        self._modules: set[str] = set()
        self._collect(job, ())

    def text(self) -> str:
        blocks = [f'JOB = {self._reference(self._job)}']
        for instance in self._instances:
            name = self._name(instance)
            lines = [f'{name}.{field} = {self._write(value)}' for field, value in _fields(instance)]
            if lines:
                blocks.append('\n'.join(lines))
        imports = sorted(self._import_line(module) for module in self._modules)
        return '\n\n'.join((_HEADER + '\n'.join(imports), *blocks)) + '\n'

    def _collect(self, value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, list | tuple):
            for index, item in enumerate(value):
                self._collect(item, (*path[:-1], f'{path[-1]}_{index}'))
        elif isinstance(value, dict):
            self._collect(list(value.values()), path)
        elif isinstance(value, types.FunctionType):
            self._modules.add(_address(value)[0])
        elif dataclasses.is_dataclass(value):
            self._modules.add(_address(type(value))[0])
            scopes = self._scopes.setdefault(type(value), {})
            if self._key(value) in scopes:
                return
            scope = '/'.join(path) or 'job'
            while scope in scopes.values():
                scope += '_'
            scopes[self._key(value)] = scope
            self._instances.append(value)
            for field, item in _fields(value):
                self._collect(item, (*path, field))

    def _key(self, instance: Any) -> str:
        """Text that is equal for equal configs only, unlike `==`, to which 1, 1.0 and True are equal."""
        if id(instance) not in self._keys:
            values = [f'{field}={self._write(value, nested=self._key)}' for field, value in _fields(instance)]
            self._keys[id(instance)] = f'{".".join(_address(type(instance)))}({", ".join(values)})'
        return self._keys[id(instance)]

    def _reference(self, instance: Any) -> str:
        return f'@{self._name(instance)}()'

    def _name(self, instance: Any) -> str:
        """Scope, if its class needs one, and selector of `instance`."""
        scopes = self._scopes[type(instance)]
        scope = f'{scopes[self._key(instance)]}/' if len(scopes) > 1 else ''
        return scope + self._selector(type(instance))

    def _selector(self, target: type | types.FunctionType) -> str:
        module, name = _address(target)
        return f'{self._symbol(module)}.{name}'

    def _symbol(self, module: str) -> str:
        """The name by which `module` is imported: its last part, unless another module claims that, too."""
        last = module.rpartition('.')[2]
        claimed = any(other != module and other.rpartition('.')[2] == last for other in self._modules)
        return module.replace('.', '_') if claimed or last == 'gin' else last

    def _import_line(self, module: str) -> str:
        package, _, last = module.rpartition('.')
        symbol = self._symbol(module)
        statement = f'from {package} import {last}' if package else f'import {module}'
        return statement if symbol == last else f'{statement} as {symbol}'

    def _write(self, value: Any, nested: Any = None) -> str:
        """`value` as gin text; configs inside it as `nested` says, which is by reference if not given."""
        if isinstance(value, list | tuple):
            items = ', '.join(self._write(item, nested) for item in value)
            if isinstance(value, list):
                return f'[{items}]'
            return f'({items},)' if len(value) == 1 else f'({items})'
        if isinstance(value, dict):
            pairs = (f'{self._write(key, nested)}: {self._write(item, nested)}' for key, item in value.items())
            return f'{{{", ".join(pairs)}}}'
        if isinstance(value, types.FunctionType):
            return f'@{self._selector(value)}'
        if dataclasses.is_dataclass(value):
            return (nested or self._reference)(value)
        if isinstance(value, float) and math.isnan(value):
            raise TypeError('gin cannot write nan')
        if isinstance(value, float) and math.isinf(value):
            return '1e999' if value > 0 else '-1e999'  # gin reads no `inf`
        return repr(value)


def _fields(instance: Any) -> list[tuple[str, Any]]:
    """The fields of a config and their values, as reading them from gin would make them."""
    values = []
    cls: type = type(instance)
    for field, annotation in checking.parameters(cls).items():
        try:
            value = checking.coerce(getattr(instance, field), annotation)
        except checking.MismatchError as mismatch:
            what = f'{cls.__qualname__}.{field} holds {checking.show(mismatch.got)}'
            raise TypeError(f'{what}, but is declared as {mismatch.expected}') from None
        values.append((field, value))
    return values


def _address(target: type | types.FunctionType) -> tuple[str, str]:
    """(module, qualified name) of a class or function, by which it can be imported."""
    module, name = target.__module__, target.__qualname__
    try:
        found: object = functools.reduce(getattr, name.split('.'), sys.modules[module])
    except (AttributeError, KeyError):
        found = None
    if found is not target:
        raise TypeError(f'{module}.{name} cannot be imported by that name')
    return module, name
