"""Bytes that a compiled TPU program reads from and writes to HBM, as its instructions say, loops multiplied out.

Each instruction outside of fusions reads its operands and writes its result once, unless they are in on-chip memory
(XLA:TPU marks arrays in VMEM, in the layout, by memory space 1). Of an array that a fusion only slices, the slices
count; of one that it updates in place, the update. A hand-written kernel counts its operands and results once, though
it may read blocks again. So this is what the program moves at the least, without padding.
"""

import math
import re
from collections.abc import Iterator

from llm.scaling.program.hlo_text import Computation, Instruction, array_shapes, parse
from llm.scaling.program.loops import executions

_FREE = frozenset(
    [
        'parameter',
        'constant',
        'tuple',
        'get-tuple-element',
        'bitcast',
        'while',
        'conditional',
        'call',
        'after-all',
        'partition-id',
        'replica-id',
        'iota',
        'opt-barrier',
        'domain',
        'add-dependency',
    ]
)
_COPYING = ('copy-start', 'slice-start', 'dynamic-slice-start')
_CONTINUED = ('all-gather', 'all-to-all', 'collective-permute')
_SLICING = ('dynamic-slice', 'slice', 'gather')
_ARRAY_WITH_LAYOUT = re.compile(r'[a-z][a-z0-9]*\[[0-9,<=\s]*\](?:\{[^}]*\})?')
_ON_CHIP = re.compile(r'S\([1-9]\d*\)')


def hbm_bytes(text: str) -> float:
    """Bytes to and from HBM in one run of a program, on one device.

    Args:
        text: optimized HLO, `compiled.as_text()`.
    """
    total, computations = 0.0, parse(text)
    for name, times in executions(computations).items():
        computation = computations[name]
        moved = sum(
            _instruction_bytes(each, computation, computations)
            for each in computation.instructions.values()
            if each.opcode not in _FREE and not each.opcode.endswith('-done')
        )
        total += times * moved
    return total


def _in_hbm(type_text: str) -> float:
    """Bytes of the arrays of a type that are not on chip."""
    return sum(
        shape.bytes
        for text in _ARRAY_WITH_LAYOUT.findall(type_text)
        if not _ON_CHIP.search(text)
        for shape in array_shapes(text)
    )


def _instruction_bytes(
    instruction: Instruction, computation: Computation, computations: dict[str, Computation]
) -> float:
    operands = [computation.instructions[name] for name in instruction.operands if name in computation.instructions]
    if instruction.opcode == 'fusion':
        return _fusion_bytes(operands, computations[instruction.called[0][1]], computations)
    if instruction.opcode in _SLICING:
        return 2 * _in_hbm(instruction.type_text)
    if instruction.opcode == 'dynamic-update-slice':
        return 2 * _in_hbm(operands[1].type_text)
    if instruction.opcode in _COPYING:
        return _copied_bytes(instruction.type_text)
    if instruction.opcode.endswith('-start'):  # the result names the operand too
        return _in_hbm(instruction.type_text)
    return _in_hbm(instruction.type_text) + sum(_in_hbm(operand.type_text) for operand in operands)


def _copied_bytes(type_text: str) -> float:
    """Of an asynchronous copy or slice, whose result names source and target: each counts if it is in HBM."""
    texts = [text for text in _ARRAY_WITH_LAYOUT.findall(type_text) if '[]' not in text]
    size = min((shape.bytes for text in texts for shape in array_shapes(text)), default=0.0)
    return size * min(2, sum(not _ON_CHIP.search(text) for text in texts))


def _fusion_bytes(operands: list[Instruction], inner: Computation, computations: dict[str, Computation]) -> float:
    if 'custom_call_target="AsyncCollectiveDone"' in inner.root.attributes:
        return 0.0  # its bytes were counted at the start
    total, updated = 0.0, set()
    for root in _results(inner):
        if root.opcode == 'parameter' or root.opcode in _CONTINUED:
            continue  # handed through, or on its way since an earlier fusion
        if root.opcode == 'dynamic-update-slice':
            update = inner.instructions[root.operands[1]]
            target = _source(inner, root.operands[0])
            if target is not None and target.opcode == 'parameter':
                updated.add(int(target.arguments))
            if not _ON_CHIP.search(root.type_text):
                total += sum(shape.bytes for shape in update.shapes)
        else:
            total += _in_hbm(root.type_text)
    for number, operand in enumerate(operands):
        whole = _in_hbm(operand.type_text)
        if whole and number not in updated:
            total += min(whole, _read_bytes(number, inner, computations))
    return total


def _read_bytes(number: int, fused: Computation, computations: dict[str, Computation]) -> float:
    """How much of its parameter `number` a fused computation reads, fusions within it looked into."""
    if number not in fused.parameters:
        return math.inf
    waiting, total = [fused.parameters[number].name], 0.0
    while waiting:
        name = waiting.pop()
        for user in fused.users.get(name, ()):
            if user.opcode in _SLICING:
                total += sum(shape.bytes for shape in user.shapes)
            elif user.opcode == 'bitcast':
                waiting.append(user.name)
            elif user.opcode == 'fusion':
                inner = computations[user.called[0][1]]
                total += sum(
                    _read_bytes(i, inner, computations) for i, each in enumerate(user.operands) if each == name
                )
            elif user.opcode != 'tuple' and user.opcode not in _CONTINUED:
                return math.inf
    return total


def _results(computation: Computation) -> Iterator[Instruction]:
    root = computation.root
    names = root.operands if root.opcode == 'tuple' else (root.name,)
    for name in names:
        made = _source(computation, name)
        if made is not None:
            yield made


def _source(computation: Computation, name: str) -> Instruction | None:
    instruction = computation.instructions.get(name)
    while instruction is not None and instruction.opcode == 'bitcast':
        instruction = computation.instructions.get(instruction.operands[0])
    return instruction
