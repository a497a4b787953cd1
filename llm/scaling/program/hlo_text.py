"""Optimized HLO as text (`compiled.as_text()`) to computations of instructions.

The text has one instruction a line, `[ROOT] %name = type opcode(operands), attributes`, within computations that open
with `[ENTRY] %name (parameters) -> type {` and close with `}` (https://openxla.org/xla/operation_semantics describes
the instructions). Only what counting needs is parsed, and attributes only when asked for.
"""

import dataclasses
import functools
import math
import re

# Bits of an element type whose name does not say them.
_BITS = {'pred': 8, 'token': 0, 'opaque': 0, 'c64': 64, 'c128': 128}
_ARRAY = re.compile(r'\b([a-z][a-z0-9]*)\[([0-9,<=\s]*)\]')
_COMPUTATION = re.compile(r'^(ENTRY\s+)?%?([\w.\-]+)\s+\(.*\)\s*->\s*.*\{\s*$')
_INSTRUCTION = re.compile(r'^\s+(ROOT\s+)?%?([\w.\-]+)\s+=\s+(.*)$')
_COMMENT = re.compile(r'/\*.*?\*/')
_CALLED = re.compile(r'\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)')
_CALLED_LIST = re.compile(r'\b(?:branch_computations|called_computations)=\{([^}]*)\}')
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Shape:
    """Element type and dimensions of one array, as of one device."""

    element_type: str
    dimensions: tuple[int, ...]

    @property
    def bytes(self) -> float:
        """Without padding; types of less than a byte count as packed."""
        return math.prod(self.dimensions) * element_bits(self.element_type) / 8


def element_bits(element_type: str) -> int:
    """Bits of one element of an HLO type: 16 for 'bf16', 8 for 'pred' and 'f8e4m3fn', 4 for 's4'."""
    if element_type in _BITS:
        return _BITS[element_type]
    return int(re.findall(r'\d+', element_type)[0])


def array_shapes(type_text: str) -> tuple[Shape, ...]:
    """The arrays in the text of a type, tuples flattened."""
    return tuple(
        Shape(element_type, tuple(int(size.strip(' <=')) for size in sizes.split(',') if size.strip()))
        for element_type, sizes in _ARRAY.findall(_COMMENT.sub('', type_text))
    )


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        type_text: of its result. operands: names. arguments: the text between the parentheses (a literal of a constant,
            the number of a parameter). attributes: the text after them.
    """

    name: str
    opcode: str
    type_text: str
    arguments: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the instructions that it reads."""
        pieces = _split_top_level(_COMMENT.sub('', self.arguments))
        return tuple(piece.rsplit(' ', 1)[-1].lstrip('%') for piece in pieces if piece)

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Arrays of its result, a tuple flattened."""
        return array_shapes(self.type_text)

    def attribute(self, name: str) -> str | None:
        """The value of an attribute that is a word or number: `attribute('index')`."""
        found = re.search(rf'\b{name}=([\w.\-]+)', self.attributes)
        return found[1] if found else None

    def list_attribute(self, name: str) -> str | None:
        """What is between the braces of `name={...}`, which may be nested."""
        start = self.attributes.find(f'{name}={{')
        if start < 0:
            return None
        open_brace = start + len(name) + 1
        return self.attributes[open_brace + 1 : _closing(self.attributes, open_brace)]

    @functools.cached_property
    def called(self) -> tuple[tuple[str, str], ...]:
        """(attribute, computation) of every computation that it names: ('body', 'region_1'), ('branch', ...), ..."""
        found = [(kind, name) for kind, name in _CALLED.findall(self.attributes)]
        for names in _CALLED_LIST.findall(self.attributes):
            found += [('branch', name.strip().lstrip('%')) for name in names.split(',') if name.strip()]
        return tuple(found)

    @property
    def known_trip_count(self) -> int | None:
        """What the compiler wrote down for a `while`."""
        found = _TRIP_COUNT.search(self.attributes)
        return int(found[1]) if found else None

    @property
    def op_name(self) -> str:
        """JAX's name for where it comes from; '' if there is none."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ''


@dataclasses.dataclass(frozen=True)
class Computation:
    """A computation and its instructions by name, in the order of the text."""

    name: str
    is_entry: bool
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next(each for each in self.instructions.values() if each.is_root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameter instructions by number."""
        return {int(each.arguments): each for each in self.instructions.values() if each.opcode == 'parameter'}

    @functools.cached_property
    def users(self) -> dict[str, tuple[Instruction, ...]]:
        """The instructions that read each name."""
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for operand in instruction.operands:
                users.setdefault(operand, []).append(instruction)
        return {name: tuple(found) for name, found in users.items()}


def parse(text: str) -> dict[str, Computation]:
    """The computations of an HLO module by name.

    Raises:
        ValueError: there is no entry computation.
    """
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    for line in text.splitlines():
        if current is None:
            if header := _COMPUTATION.match(line):
                current = Computation(header[2], is_entry=bool(header[1]), instructions={})
                computations[current.name] = current
        elif line.startswith('}'):
            current = None
        elif found := _INSTRUCTION.match(line):
            instruction = _instruction(found[2], found[3], bool(found[1]))
            if instruction is not None:
                current.instructions[instruction.name] = instruction
    if not any(computation.is_entry for computation in computations.values()):
        raise ValueError('the text has no ENTRY computation: it is not optimized HLO')
    return computations


def _instruction(name: str, rest: str, is_root: bool) -> Instruction | None:
    """`rest` is what follows the equals sign."""
    end = _closing(rest, 0) + 1 if rest.startswith('(') else rest.find(' ')
    type_text, call = rest[:end], rest[end:].lstrip()
    open_parenthesis = call.find('(')
    if open_parenthesis < 0:
        return None
    close = _closing(call, open_parenthesis)
    return Instruction(
        name=name,
        opcode=call[:open_parenthesis],
        type_text=type_text,
        arguments=call[open_parenthesis + 1 : close].strip(),
        attributes=call[close + 1 :],
        is_root=is_root,
    )


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`; brackets in quotes do not count."""
    opening = text[start]
    closing = {'(': ')', '{': '}', '[': ']'}[opening]
    depth = 0
    for match in re.finditer(rf'"(?:[^"\\]|\\.)*"|[{re.escape(opening + closing)}]', text[start:]):
        if match[0] == opening:
            depth += 1
        elif match[0] == closing:
            depth -= 1
            if depth == 0:
                return start + match.start()
    return len(text) - 1


def _split_top_level(text: str) -> list[str]:
    """Pieces between commas that are in no bracket."""
    pieces, depth, start = [], 0, 0
    for index, character in enumerate(text):
        if character in '([{':
            depth += 1
        elif character in ')]}':
            depth -= 1
        elif character == ',' and depth == 0:
            pieces.append(text[start:index].strip())
            start = index + 1
    return [*pieces, text[start:].strip()]
