"""Every triple of parallel axes, models, schedules and options against one device; writes docs/parallelism.md's table.

    python tools/parity_matrix.py [--strength=3] [--results=runs/parity.jsonl]

Goes on where it stopped: a case whose verdict is in the results file is not run again. The table lies between two marks
in the page.
"""

import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
PAGE, BEGIN, END = ROOT / 'docs' / 'parallelism.md', '<!-- parity: begin -->\n', '<!-- parity: end -->\n'


def main() -> None:
    """Run what is left, and write the page."""
    from tests.training.parity_cases import FACTORS, cases, name, verdict

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--strength', type=int, default=3)
    parser.add_argument('--results', type=Path, default=ROOT / 'runs' / 'parity.jsonl')
    arguments = parser.parse_args()
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    done: dict[str, tuple[str, list[str]]] = {}
    if arguments.results.exists():
        for line in arguments.results.read_text().splitlines():
            entry = json.loads(line)
            done[entry['case']] = entry['verdict'], entry['why']

    wanted = cases(arguments.strength, tuple(FACTORS['model']))
    # Cases of one model and number of microbatches share what they are compared with.
    wanted.sort(key=lambda case: (case['model'], case['pipeline'] * case['accumulation'], case['packed']))
    with arguments.results.open('a') as results:
        for number, case in enumerate(wanted, 1):
            if name(case) not in done:
                done[name(case)] = verdict(case)
                kind, why = done[name(case)]
                print(f'{number} of {len(wanted)}: {name(case)}: {kind} {"; ".join(why)}', flush=True)
                results.write(json.dumps({'case': name(case), 'verdict': kind, 'why': why}) + '\n')
                results.flush()
    write_page(arguments.strength, wanted, {name(case): done[name(case)] for case in wanted})


def write_page(strength: int, wanted: list[Any], verdicts: dict[str, tuple[str, list[str]]]) -> None:
    """Put counts by mesh, and all that is not equal, into the page."""
    from tests.training.parity_cases import AXES, name

    counts = Counter(kind for kind, _ in verdicts.values())
    by_mesh: dict[str, Counter[str]] = {}
    for case in wanted:
        mesh = ' x '.join(f'{axis} {case[axis]}' for axis in AXES if case[axis] > 1)
        by_mesh.setdefault(mesh, Counter())[verdicts[name(case)][0]] += 1
    lines = [
        f'A covering array of strength {strength}: {len(wanted)} training steps in float64 on 8 simulated devices, '
        f'{counts["equal"]} equal to one device within 1e-9, {counts["differs"]} different, '
        f'{counts["refused"]} refused with an error.',
        '',
        '| mesh | equal | different | refused |',
        '|---|---|---|---|',
        *(f'| {mesh} | {c["equal"]} | {c["differs"]} | {c["refused"]} |' for mesh, c in sorted(by_mesh.items())),
        '',
    ]
    rest = {case: verdict for case, verdict in verdicts.items() if verdict[0] != 'equal'}
    lines += [f'- {case}: {kind}: {"; ".join(why)}' for case, (kind, why) in sorted(rest.items())] + [''] * bool(rest)
    before, _, after = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + '\n'.join(lines) + END + after.partition(END)[2])


if __name__ == '__main__':
    main()
