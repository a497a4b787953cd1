"""gin files and command-line bindings, read into a list of statements that know their file and line.

The grammar is gin's own (`gin.config_parser`); nothing is imported or looked up here.
"""

import dataclasses
import functools
import os
import re
import tokenize
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from gin import config_parser

from llm.configuration import files, suggesting
from llm.errors import UserError

COMMAND_LINE = '--gin_bindings'
_MAX_DEPTH = 50  # brackets within brackets; more is a mistake, and would exhaust Python's stack


class Location(NamedTuple):
    """Where a statement stands. `file` is COMMAND_LINE for a binding given there, whose `text` is then shown."""

    file: str
    line: int
    text: str = ''

    def __str__(self) -> str:
        if self.file == COMMAND_LINE:
            return f"{COMMAND_LINE}='{shorten(self.text)}'"
        return f'{self.file}:{self.line}'


@dataclasses.dataclass(frozen=True)
class Reference:
    """`@scope/module.Name()`, or without the parentheses if not `evaluate`."""

    scope: tuple[str, ...]
    selector: str
    evaluate: bool

    def __repr__(self) -> str:
        return f'@{"/".join((*self.scope, self.selector))}{"()" if self.evaluate else ""}'


@dataclasses.dataclass(frozen=True)
class Macro:
    """`%NAME`."""

    name: str

    def __repr__(self) -> str:
        return f'%{self.name}'


REQUIRED = Macro('gin.REQUIRED')


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """`scope/selector.parameter = value`; a macro has no scope and no selector and is called `parameter`.

    Attributes:
        value: literals, `Reference` and `Macro`, possibly nested in lists, tuples and dicts.
        comment: what follows `#` on the statement's first line.
    """

    scope: str
    selector: str
    parameter: str
    value: object
    location: Location
    comment: str = ''

    @property
    def is_macro(self) -> bool:
        return not self.selector

    @property
    def name(self) -> str:
        """The left-hand side, as written."""
        scope = f'{self.scope}/' if self.scope else ''
        return self.parameter if self.is_macro else f'{scope}{self.selector}.{self.parameter}'


@dataclasses.dataclass(frozen=True, eq=False)
class Import:
    """`import module`, `from package import module`, either with `as name`. `name` is the symbol it binds."""

    module: str
    name: str
    binds_root: bool  # `import a.b` binds `a`; the other forms bind the module itself
    location: Location


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """The head `scope/selector:` of an indented group of bindings."""

    selector: str
    location: Location


Statement = Setting | Import | Block


def read_statements(gin_files: Sequence[str], bindings: Sequence[str]) -> list[Statement]:
    """All statements in the order in which they take effect: files with their includes, then `bindings`.

    Raises:
        UserError: a file or include is missing, or a statement cannot be parsed.
    """
    statements: list[Statement] = []
    for name in gin_files:
        statements += _read_file(name, None, ())
    for text in bindings:
        statements += parse(text, functools.partial(Location, COMMAND_LINE, text=text), ())
    return statements


def references(value: object) -> Iterator[Reference | Macro]:
    """Every reference and macro inside `value`."""
    if isinstance(value, Reference | Macro):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from references(item)
    elif isinstance(value, dict):
        yield from references(list(value.values()))


def shorten(text: str, width: int = 80) -> str:
    """`text` cut in the middle to `width` characters."""
    return text if len(text) <= width else f'{text[: width - 20]} ... {text[-14:]}'


def _read_file(name: str, included_at: Location | None, including: tuple[str, ...]) -> Iterator[Statement]:
    where = str(included_at or '')
    path = files.find(name, where=where)
    identity = os.path.realpath(path)
    if identity in including:
        raise UserError(f'{name!r} includes itself', where=where, fix='Remove the include.')
    text = files.read(path, where=where)
    yield from parse(text, functools.partial(Location, path), (*including, identity))


def parse(text: str, locate: Callable[[int], Location], including: tuple[str, ...] = ()) -> Iterator[Statement]:
    """The statements of `text` and, in their places, those of the files that it includes.

    Args:
        text: gin source.
        locate: makes a Location of a line number.
        including: real paths of the files that lead here by inclusion.

    Raises:
        UserError: a statement cannot be parsed, or a file is missing or includes itself.
    """
    for statement in _gin_statements(text, locate):
        location = locate(statement.location.line_num)
        match statement:
            case config_parser.IncludeStatement():
                yield from _read_file(statement.filename, location, including)
            case config_parser.ImportStatement(module=module):
                binds_root = not statement.is_from and not statement.alias
                yield Import(module, statement.bound_name(), binds_root, location)
            case config_parser.BlockDeclaration(selector=selector):
                yield Block(selector, location)
            case config_parser.BindingStatement(scope=scope, selector=selector, arg_name=parameter, value=value):
                _check_nesting(value, location)
                comment = statement.location.line_content.partition('#')[2].strip()
                if not parameter:  # gin's parser calls a macro a selector without parameter
                    scope, selector, parameter = '', '', f'{scope}/{selector}' if scope else selector
                yield Setting(scope, selector, parameter, value, location, comment)


class _Delegate(config_parser.ParserDelegate):
    """Makes the values that gin's parser leaves to its caller."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        *scope, selector = scoped_configurable_name.split('/')
        return Reference(tuple(scope), selector, evaluate)

    def macro(self, macro_name: str) -> Macro:
        return Macro(macro_name)


def _gin_statements(text: str, locate: Callable[[int], Location]) -> list[Any]:
    """The statements of gin's parser, every way it has of failing turned into a UserError."""
    text = text.replace('\r\n', '\n').replace('\r', '\n')
    lines = text.split('\n')
    line, statements = _next_statement(lines, 1), []
    try:
        with warnings.catch_warnings():
            # '\\d' in a string is a warning in Python, to be an error one day; here it is a user's path or regex.
            warnings.simplefilter('error')
            parser = config_parser.ConfigParser(f'{text}\n', _Delegate())
            # Not a for loop: the parser ends early, in silence, if its tokens run out within a statement.
            while (statement := parser.parse_statement()) is not None:
                statements.append(statement)
                line = _next_statement(lines, parser.current_token.start[0])
    except tokenize.TokenError as error:
        message, (line_of_error, _) = error.args
        if 'EOF' in message:
            message, line_of_error = 'a bracket or quote opened at or below this line is never closed', line
        raise UserError(message, where=str(locate(line_of_error))) from None
    except SyntaxError as error:
        location = locate(error.lineno or line)
        raise UserError(_explain(error), where=str(location), fix=_syntax_fix(error, location)) from None
    except TypeError:
        raise UserError(
            'a list or dict cannot be the key of a dict', where=str(locate(line)), fix='Use a string or number.'
        ) from None
    except UnicodeError:
        raise UserError('a character here is not valid Unicode', where=str(locate(line))) from None
    except (StopIteration, RecursionError):
        raise UserError('the statement cannot be read to its end', where=str(locate(line))) from None
    return statements


def _next_statement(lines: list[str], line: int) -> int:
    """The first line number from `line` that holds more than a comment."""
    while line < len(lines) and not lines[line - 1].partition('#')[0].strip():
        line += 1
    return line


def _explain(error: SyntaxError) -> str:
    message, _, token = error.msg.partition('\n    Failed to parse token ')
    if token:
        reason = '' if 'malformed node' in message else f': {message.partition(" (<unknown>")[0]}'
        return f'cannot read the value {shorten(token[1:-1])}{reason}'
    line = (error.text or '').strip()
    return f'cannot read {shorten(line)!r}: {message.strip().rstrip(".")}' if line else message.strip().rstrip('.')


def _syntax_fix(error: SyntaxError, location: Location) -> str:
    token = error.msg.partition('Failed to parse token ')[2][1:-1]
    constant = suggesting.closest(token, ('True', 'False', 'None'))
    if constant:
        return f'Did you mean {constant}?'
    if 'invalid escape sequence' in error.msg:
        return 'Write a backslash twice.'
    name, equals, value = (part.strip() for part in location.text.partition('='))
    if equals and value and not re.search(r"""['"@%()[\]{}]""", value):
        return f"""A string needs quotes of its own: {COMMAND_LINE}='{name}="{value}"'."""
    if token:
        return 'Write a string in quotes, a reference as @module.Name(), a macro as %NAME.'
    words = (error.text or '').split()
    keyword = suggesting.closest(words[0], ('include', 'import', 'from')) if words else None
    return f'Did you mean {keyword}?' if keyword else ''


def _check_nesting(value: object, location: Location, depth: int = 0) -> None:
    if depth > _MAX_DEPTH:
        raise UserError('brackets are nested too deeply', where=str(location))
    if isinstance(value, dict):
        if any(True for key in value for _ in references(key)):
            raise UserError('a reference cannot be the key of a dict', where=str(location), fix='Use a literal.')
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            _check_nesting(item, location, depth + 1)
