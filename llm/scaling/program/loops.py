"""How often a `while` of optimized HLO runs its body."""

import operator

from llm.scaling.program.hlo_text import Computation, Instruction

_SAME_VALUE = ('copy', 'bitcast', 'convert', 'reshape')
_COMPARISONS = {'LT': operator.lt, 'LE': operator.le, 'GT': operator.gt, 'GE': operator.ge, 'NE': operator.ne}
_MOST_TRIPS = 10_000_000


def trip_count(loop: Instruction, within: Computation, computations: dict[str, Computation]) -> int | None:
    """Trips of the instruction `loop` of computation `within`; None if it does not count to a constant.

    The counter is what the condition compares with a constant; the body must add a constant to it. Its first value is
    looked for in `within`, and is 0 if it is not a constant there.
    """
    if loop.known_trip_count is not None:
        return loop.known_trip_count
    called = {attribute: computations[name] for attribute, name in loop.called}
    body, condition = called['body'], called['condition']
    compared = _comparison(condition, computations)
    if compared is None:
        return None
    direction, index, limit = compared
    step = _step(body, index, computations)
    if step is None or step == 0:
        return None
    first = _element(within, loop.operands[0], index)
    start = None if first is None else _constant(within, first)
    return _count(start or 0, step, direction, limit)


def _count(start: int, step: int, direction: str, limit: int) -> int | None:
    goes_on = _COMPARISONS.get(direction)
    if goes_on is None:
        return None
    if direction == 'NE':
        distance = limit - start
        return distance // step if distance % step == 0 and distance // step >= 0 else None
    if (step > 0) != (direction in ('LT', 'LE')):
        return None if goes_on(start, limit) else 0
    inclusive = direction in ('LE', 'GE')
    distance = (limit - start) * (1 if step > 0 else -1) + inclusive
    trips = max(0, -(-distance // abs(step)))
    return trips if trips <= _MOST_TRIPS else None


def _comparison(condition: Computation, computations: dict[str, Computation]) -> tuple[str, int, int] | None:
    """(direction, position in the loop's tuple, constant) of what decides whether the loop goes on."""
    compare, operands = _inlined(condition, condition.root, computations)
    if compare.opcode != 'compare':
        return None
    direction = compare.attribute('direction') or ''
    positions = [_position(scope, name) for scope, name in operands]
    constants = [_constant(scope, name) for scope, name in operands]
    if positions[0] is not None and constants[1] is not None:
        return direction, positions[0], constants[1]
    if positions[1] is not None and constants[0] is not None:
        mirrored = {'LT': 'GT', 'GT': 'LT', 'LE': 'GE', 'GE': 'LE'}.get(direction, direction)
        return mirrored, positions[1], constants[0]
    return None


def _inlined(
    computation: Computation, instruction: Instruction, computations: dict[str, Computation]
) -> tuple[Instruction, list[tuple[Computation, str]]]:
    """The instruction that makes a value, a fusion or call looked into, and its operands with where they are."""
    if instruction.opcode not in ('fusion', 'call'):
        return instruction, [(computation, name) for name in instruction.operands]
    inner = computations[instruction.called[0][1]]
    root, operands = _through(inner, inner.root.name) or inner.root, []
    for name in root.operands:
        source = _through(inner, name)
        if source is not None and source.opcode == 'parameter':
            operands.append((computation, instruction.operands[int(source.arguments)]))
        else:
            operands.append((inner, name))
    return root, operands


def _through(computation: Computation, name: str) -> Instruction | None:
    """The instruction that makes the value `name`, behind copies."""
    instruction = computation.instructions.get(name)
    while instruction is not None and instruction.opcode in _SAME_VALUE:
        instruction = computation.instructions.get(instruction.operands[0])
    return instruction


def _position(computation: Computation, name: str) -> int | None:
    """Which element of the computation's one tuple parameter `name` is."""
    instruction = _through(computation, name)
    if instruction is None or instruction.opcode != 'get-tuple-element':
        return None
    source = _through(computation, instruction.operands[0])
    if source is None or source.opcode != 'parameter':
        return None
    return int(instruction.attribute('index') or 0)


def _constant(computation: Computation, name: str) -> int | None:
    """The integer that `name` is, if it is a constant."""
    instruction = _through(computation, name)
    if instruction is None or instruction.opcode != 'constant':
        return None
    try:
        return int(instruction.arguments)
    except ValueError:
        return None


def _element(computation: Computation, name: str, index: int) -> str | None:
    """The name of element `index` of the tuple `name`."""
    instruction = _through(computation, name)
    if instruction is None or instruction.opcode != 'tuple':
        return None
    return instruction.operands[index]


def _step(body: Computation, index: int, computations: dict[str, Computation]) -> int | None:
    """What one trip adds to element `index` of the loop's tuple."""
    name = _element(body, body.root.name, index)
    instruction = None if name is None else _through(body, name)
    if instruction is None:
        return None
    update, operands = _inlined(body, instruction, computations)
    if update.opcode not in ('add', 'subtract'):
        return None
    positions = [_position(scope, each) for scope, each in operands]
    constants = [_constant(scope, each) for scope, each in operands]
    if positions[0] == index and constants[1] is not None:
        return constants[1] if update.opcode == 'add' else -constants[1]
    if positions[1] == index and constants[0] is not None and update.opcode == 'add':
        return constants[0]
    return None


def executions(computations: dict[str, Computation]) -> dict[str, int]:
    """How often each computation that is not part of a fusion runs in one run of the program.

    Every branch of a conditional counts as run; a loop of unknown length runs once.
    """
    counts: dict[str, int] = {}

    def visit(computation: Computation, times: int) -> None:
        counts[computation.name] = counts.get(computation.name, 0) + times
        for instruction in computation.instructions.values():
            if instruction.opcode == 'while':
                trips = trip_count(instruction, computation, computations)
                for _, name in instruction.called:
                    visit(computations[name], times * (1 if trips is None else trips))
            elif instruction.opcode in ('conditional', 'call', 'async-start'):
                for _, name in instruction.called:
                    visit(computations[name], times)

    visit(next(each for each in computations.values() if each.is_entry), 1)
    return counts
