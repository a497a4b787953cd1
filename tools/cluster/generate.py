"""Writes the manifests of a description beside it: `python -m tools.cluster.generate DESCRIPTION.yaml [FOLDER]`.

Makes jobset.yaml, slurm.sh (not for TPUs) and skypilot.yaml, by default in the description's own folder.
"""

import sys
from pathlib import Path

from llm.errors import UserError
from tools.cluster.description import read_description
from tools.cluster.manifests import jobset, skypilot, slurm


def generate(description: Path) -> dict[str, str]:
    """File name to content of every manifest.

    Raises:
        UserError: there is something wrong with the description.
    """
    run = read_description(description)
    makers = {'jobset.yaml': jobset, 'slurm.sh': slurm, 'skypilot.yaml': skypilot}
    made = {name: make(run, description.name) for name, make in makers.items()}
    return {name: text for name, text in made.items() if text is not None}


def main(arguments: list[str]) -> int:
    """Write them; the exit code."""
    if len(arguments) not in (1, 2):
        print(__doc__, file=sys.stderr)
        return 2
    description = Path(arguments[0])
    folder = Path(arguments[1]) if len(arguments) == 2 else description.parent
    try:
        for name, text in generate(description).items():
            (folder / name).write_text(text, encoding='utf-8')
            print(folder / name)
    except (UserError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
