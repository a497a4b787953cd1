"""Whether a table does what a training step needs: replayed with labels instead of numbers."""

from collections import Counter

from llm.parallel.pipeline.schedules import Operation
from llm.parallel.pipeline.table import Table

_FORWARD, _RECOMPUTE = Operation.FORWARD, Operation.RECOMPUTE
_INPUT_GRADIENT = (Operation.BACKWARD, Operation.INPUT_GRADIENT, Operation.RECOMPUTE_INPUT_GRADIENT)
_WEIGHT_GRADIENT = (Operation.BACKWARD, Operation.WEIGHT_GRADIENT)


def validate(table: Table) -> None:
    """Run the table with every buffer holding labels of what the executor would hold.

    Raises:
        ValueError: an operation reads what is not there (not yet, or no longer), something is done twice or never, or a
            buffer is too small.
    """
    problem, repeats = table.problem, table.problem.chunk_repeats
    stages, chunks = problem.stages, problem.config.chunks
    inputs: list[dict[tuple[int, int], tuple[int, int]]] = [{} for _ in range(stages)]  # (slot, repeat) -> owner
    gradients: list[dict[int, tuple[int, int, int]]] = [{} for _ in range(stages)]  # slot -> owner, repeats left
    residuals: list[dict[int, tuple[int, int, int]]] = [{} for _ in range(stages)]
    operands: list[dict[int, tuple[int, int, int]]] = [{} for _ in range(stages)]
    done: Counter[tuple[str, int, int, int, int]] = Counter()
    embedded: Counter[int] = Counter()
    lost: Counter[int] = Counter()
    returned: Counter[int] = Counter()

    def expect(condition: bool, what: str) -> None:
        if not condition:
            raise ValueError(f'tick {tick}: {what} ({problem})')

    for tick in range(len(table.timeline)):
        joint = {name: int(column[tick]) for name, column in table.joint.items()}
        if joint['embed'] >= 0:
            expect(0 <= joint['embed_slot'] < table.input_slots, 'no such input slot')
            inputs[0][joint['embed_slot'], 0] = (joint['embed'], 0)
            embedded[joint['embed']] += 1
        sent: list[tuple[str, int, tuple[int, int]]] = []
        finished: int | None = None
        came_out: int | None = None
        for stage in range(stages):
            cell = {name: int(column[tick, stage]) for name, column in table.columns.items()}
            operation, m, chunk = Operation(cell['operation']), cell['microbatch'], cell['chunk']
            first, last = cell['first'], cell['first'] + cell['count']
            slot, owner = cell['input_slot'], (m, chunk)
            expect(slot < table.input_slots, 'no such input slot')
            if operation == _FORWARD:
                expect(inputs[stage].get((slot, first)) == owner, f'stage {stage} has no input of {owner}')
                for repeat in range(first, last):
                    inputs[stage][slot, repeat] = owner
                    done['forward', stage, chunk, m, repeat] += 1
                if last < repeats:
                    inputs[stage][slot, last] = owner
                elif problem.after(stage, chunk) is None:
                    finished = m
                else:
                    sent.append(('input', stage, owner))
            if operation in (_RECOMPUTE, Operation.BACKWARD, Operation.RECOMPUTE_INPUT_GRADIENT):
                for repeat in range(first, last):
                    expect(inputs[stage].get((slot, repeat)) == owner, f'stage {stage} lost an input of {owner}')
                    expect(done['forward', stage, chunk, m, repeat] == 1, f'stage {stage} goes back too early')
                    if operation == _RECOMPUTE:
                        at = repeat - first
                        expect(at < table.residual_cells, 'no such residual cell')
                        residuals[stage][at] = (*owner, repeat)
            if operation in _INPUT_GRADIENT:
                expect(cell['gradient_slot'] < table.gradient_slots, 'no such gradient slot')
                expect(
                    gradients[stage].get(cell['gradient_slot']) == (*owner, last),
                    f'stage {stage} has no gradient of {owner} at repeat {last}',
                )
                gradients[stage][cell['gradient_slot']] = (*owner, first)
                for repeat in range(first, last):
                    done['input gradient', stage, chunk, m, repeat] += 1
                    if operation == Operation.INPUT_GRADIENT:
                        at = repeat - first
                        expect(residuals[stage].get(at) == (*owner, repeat), f'stage {stage} lost residuals of {owner}')
                    if operation != Operation.BACKWARD:
                        at = (cell['weight_cell'] + last - 1 - repeat) % table.weight_cells
                        expect(at not in operands[stage], f'stage {stage} overwrites what weight gradients need')
                        operands[stage][at] = (*owner, repeat)
                if first == 0 and problem.before(stage, chunk) is None:
                    came_out = m
                elif first == 0:
                    sent.append(('gradient', stage, owner))
            if operation in _WEIGHT_GRADIENT:
                for repeat in range(first, last):
                    done['weight gradient', stage, chunk, m, repeat] += 1
                    if operation == Operation.WEIGHT_GRADIENT:
                        found = operands[stage].pop(
                            (cell['weight_cell'] + last - 1 - repeat) % table.weight_cells, None
                        )
                        expect(found == (*owner, repeat), f'stage {stage} lost what weight gradients of {owner} need')
        if finished is not None:
            lost[finished] += 1
        if finished is not None and not problem.evaluation:
            gradients[-1][joint['loss_slot']] = (finished, chunks - 1, repeats)
        expect(joint['loss'] == (-1 if finished is None else finished), 'the loss is not computed when it can be')
        if came_out is not None:
            returned[came_out] += 1
        expect(joint['embed_gradient'] == (-1 if came_out is None else came_out), 'an embedding gradient is dropped')
        for kind, flag in (('input', 'send_inputs'), ('gradient', 'send_gradients')):
            expect(any(each == kind for each, _, _ in sent) == bool(joint[flag]), f'{flag} is wrong')
        arrived = 0
        for kind, stage, (m, chunk) in sent:
            target = problem.after(stage, chunk) if kind == 'input' else problem.before(stage, chunk)
            assert target is not None
            slot = int(table.columns[f'receive_{kind}s'][tick, target[0]])
            expect(slot >= 0, f'stage {target[0]} drops an {kind}')
            arrived += 1
            if kind == 'input':
                inputs[target[0]][slot, 0] = (m, target[1])
            else:
                gradients[target[0]][slot] = (m, target[1], repeats)
        slots = [table.columns[f'receive_{kind}s'][tick] for kind in ('input', 'gradient')]
        expect(sum(int((each >= 0).sum()) for each in slots) == arrived, 'a stage receives what nobody sent')

    tick = len(table.timeline)
    everything = stages * chunks * problem.microbatches * repeats
    for kind in ('forward', 'input gradient', 'weight gradient')[: 1 if problem.evaluation else 3]:
        cells = {key: count for key, count in done.items() if key[0] == kind}
        expect(len(cells) == everything and set(cells.values()) == {1}, f'some {kind} is done twice or never')
    counters = (('embedding', embedded), ('loss', lost), ('embedding gradient', returned))
    for name, counter in counters[: 2 if problem.evaluation else 3]:
        expect(dict(counter) == dict.fromkeys(range(problem.microbatches), 1), f'some {name} is done twice or never')
