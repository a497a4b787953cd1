"""Jinja for chat templates, which are programs of people we do not know: sandboxed, and with a budget.

Jinja's sandbox keeps a template from Python's internals and from changing what it is given. It does not keep it from
running for ever or filling the memory: so loop steps, calls and characters are counted here, the filters and methods
are a list of those that templates need, and no operation may make a text of endless length.
"""

import contextvars
import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llm.errors import UserError

# Of steps, members of lists and 64 characters; a chat needs thousands, and all of it takes seconds.
_MAX_WORK = 1_000_000
_MAX_CHARACTERS = 1 << 24
_MAX_NUMBER = 1 << 63
_MAX_SOURCE = 1 << 20

_FILTERS = re.findall(
    r'\w+',
    """abs attr batch capitalize count d default dictsort e escape first float forceescape groupby int items join
    last length list lower map max min reject rejectattr replace reverse round safe select selectattr slice sort string
    sum title trim truncate unique upper wordcount""",
)
_OF_NUMBERS = ('abs', 'float', 'int', 'round', 'string', 'tojson', 'default', 'd', 'max', 'min')
_METHODS: dict[type, set[str]] = {
    str: set(
        re.findall(
            r'\w+',
            """capitalize casefold count endswith find index isalnum isalpha isdecimal isdigit islower isnumeric isspace
        istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit
        rstrip split splitlines startswith strip swapcase title upper""",
        )
    ),
    list: {'count', 'index', 'copy'},
    tuple: {'count', 'index'},
    dict: {'get', 'items', 'keys', 'values', 'copy'},
    int: set(),
    float: {'is_integer'},
    bool: set(),
    range: set(),
}


@dataclasses.dataclass
class _Budget:
    work: int = _MAX_WORK

    def spend(self, value: Any = None) -> Any:
        """Count one step and what it made, lists within lists too; gives it back."""
        self.work -= 1
        stack = [value]
        while stack and self.work >= 0:
            each = stack.pop()
            if isinstance(each, str):
                self.work -= len(each) // 64
            elif isinstance(each, list | tuple):
                self.work -= len(each)
                stack.extend(each)
            elif isinstance(each, dict):
                self.work -= len(each)
                stack.extend(each.values())
        if self.work < 0:
            raise SecurityError('it ran for too long')
        return value


_BUDGET: contextvars.ContextVar[_Budget] = contextvars.ContextVar('budget')
_NOW: contextvars.ContextVar[datetime.datetime] = contextvars.ContextVar('now')


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        allowed = next((names for kind, names in _METHODS.items() if isinstance(obj, kind)), None)
        return super().is_safe_attribute(obj, attr, value) and (allowed is None or attr in allowed)

    def wrap_str_format(self, value: Any) -> Any:
        if isinstance(getattr(value, '__self__', None), str) and value.__name__ in ('format', 'format_map'):
            raise SecurityError("it calls 'format'")  # whose width can be any
        return None

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, '__self__', None)
        if isinstance(owner, str):
            if __obj.__name__ == 'replace' and len(args) >= 2:
                _check_replacing(owner, *args[:2])
            if __obj.__name__ == 'join' and args:
                args = (_joinable(args[0], owner),)
        return _BUDGET.get().spend(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == '*' and any(isinstance(side, str | list | tuple) for side in (left, right)):
            _check_length(_size(left) * _size(right))
        if operator == '+' and isinstance(left, str | list | tuple):
            _check_length(_size(left) + _size(right))
        if operator == '**' and isinstance(right, int) and abs(right) > 64:
            raise SecurityError(f'it raises a number to the power of {right}')
        if operator == '%' and isinstance(left, str):
            raise SecurityError("it formats text with '%'")
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and abs(result) > _MAX_NUMBER:
            raise SecurityError('it computes with numbers that are too large')
        return _BUDGET.get().spend(result)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        node: Any
        for node in template.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            step = nodes.ExprStmt(nodes.Call(nodes.EnvironmentAttribute('count_step'), [], [], None, None))
            node.body.insert(0, step.set_lineno(node.lineno))
        return _Counting().visit(template)

    @staticmethod
    def count_step() -> None:
        """Called in every step of a loop, and in every macro."""
        _BUDGET.get().spend()

    @staticmethod
    def count_value(value: Any) -> Any:
        """Called on every list, tuple and dict that a template writes down."""
        return _BUDGET.get().spend(value)

    @staticmethod
    def concatenate(*values: Any) -> str:
        """What '~' does."""
        texts = [str(value) for value in values]
        _check_length(sum(map(len, texts)))
        return ''.join(texts)


class _Counting(jinja2.visitor.NodeTransformer):
    """Puts the sandbox's own function for every '~', and counts lists, which may hold one another many times over."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        return self._called('concatenate', node, node.nodes)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._called('count_value', node, [node])

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._called('count_value', node, [node])

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._called('count_value', node, [node]) if node.ctx == 'load' else node

    def _called(self, function: str, node: nodes.Node, arguments: list[Any]) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Call(nodes.EnvironmentAttribute(function), arguments, [], None, None, lineno=node.lineno)


class _Generation(jinja2.ext.Extension):
    """The block {% generation %}: what is in it was written by the assistant, and gets a mark at both ends."""

    tags = {'generation'}  # noqa: RUF012  (as Jinja declares it)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
        return nodes.CallBlock(self.call_method('_mark'), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        begin, end = getattr(self.environment, 'marks', ('', ''))
        return f'{begin}{caller()}{end}'


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names that begin with an underscore, through which templates have escaped."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # 'self' may be a name
        namespace, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(namespace, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or name.startswith('_'):
        raise SecurityError(f'it sets {name!r} in a namespace')


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else abs(value) if isinstance(value, int) else 0


def _check_length(length: int) -> None:
    if length > _MAX_CHARACTERS:
        raise SecurityError(f'it makes a value of length {length}')


def _check_replacing(text: Any, old: Any, new: Any) -> None:
    if all(isinstance(each, str) for each in (text, old, new)):
        _check_length(len(text) + text.count(old) * len(new))


def _joinable(values: Any, separator: str) -> list[str]:
    parts = [str(part) for part in _BUDGET.get().spend(list(values))]
    _check_length(sum(map(len, parts)) + len(separator) * len(parts))
    return parts


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that counts, and that is not asked for a text of endless length."""

    @functools.wraps(function)  # keeps the attribute by which Jinja knows what to pass
    def counted(*args: Any, **kwargs: Any) -> Any:
        if name == 'replace' and len(args) >= 4:  # the first is Jinja's own
            _check_replacing(*args[1:4])
        for value in args:
            _BUDGET.get().spend(value)
            if isinstance(value, int) and abs(value) > _MAX_CHARACTERS and name not in _OF_NUMBERS:
                raise SecurityError(f'it asks {name!r} for too much')
        result = function(*args, **kwargs)
        if isinstance(result, Iterator):
            return (_BUDGET.get().spend(each) for each in result)
        return _BUDGET.get().spend(result)

    return counted


def _join(value: Any, d: str = '', attribute: Any = None) -> str:
    return d.join(_joinable([part if attribute is None else part[attribute] for part in value], d))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """As transformers gives it to templates: JSON as it is, where Jinja's own filter escapes for HTML."""
    if (isinstance(indent, int) and indent > 16) or (isinstance(indent, str) and len(indent) > 16):
        raise SecurityError(f'it asks for JSON indented by {indent!r}')
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _environment() -> _Sandbox:
    sandbox = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    filters = {name: sandbox.filters[name] for name in _FILTERS} | {'join': _join, 'tojson': _to_json}
    sandbox.filters = {name: _counted(name, function) for name, function in filters.items()}
    sandbox.globals = {
        'range': sandbox.globals['range'],  # the sandbox's, of at most 100,000
        'dict': _make_dict,
        'namespace': _Namespace,
        'cycler': sandbox.globals['cycler'],
        'joiner': sandbox.globals['joiner'],
        'raise_exception': _raise_exception,
        'strftime_now': lambda form: _NOW.get().strftime(form[:256]),
    }
    return sandbox


def compile_template(source: str, marks: tuple[str, str], name: str) -> jinja2.Template:
    """A template whose {% generation %} blocks come out between `marks`. Raises UserError."""
    if len(source) > _MAX_SOURCE:
        raise UserError(f'it has {len(source)} characters', where=name, fix='Give a chat template')
    sandbox = _environment()
    sandbox.extend(marks=marks)
    try:
        return sandbox.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f'it is no Jinja template ({error.message})', where=f'{name}:{error.lineno}') from error
    except (jinja2.TemplateError, RecursionError, MemoryError, SyntaxError, ValueError) as error:
        raise UserError(f'it cannot be compiled ({_told(error)})', where=name) from error


def render(template: jinja2.Template, values: Mapping[str, Any], now: datetime.datetime, name: str) -> str:
    """What the template makes of the values, within the budget. Raises UserError."""
    budget, clock = _BUDGET.set(_Budget()), _NOW.set(now)
    length, parts = 0, []
    try:
        for part in template.generate(**values):
            length += len(part)
            _check_length(length)
            parts.append(part)
    except Exception as error:  # whatever a foreign program raises is its fault
        raise UserError(f'it fails ({_told(error)})', where=name, fix='Change the template or the messages') from error
    finally:
        _BUDGET.reset(budget)
        _NOW.reset(clock)
    return ''.join(parts)


def _told(error: Exception) -> str:
    kind = '' if isinstance(error, jinja2.TemplateError) else f'{type(error).__name__}: '
    return f'{kind}{" ".join(str(error).split())[:300]}'
