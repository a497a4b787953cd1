"""The flags of the command line, and its help."""

import argparse
from typing import NoReturn

from llm.configuration import run_files, suggesting
from llm.errors import UserError
from llm.parallel.processes import HEARTBEAT_SECONDS, INITIALIZATION_SECONDS

_DESCRIPTION = """Run one job: train, evaluate, generate, or whatever the gin file's JOB says.
Files and bindings take effect in order: the last value set wins, and bindings come after files."""


class _Parser(argparse.ArgumentParser):
    """Reports errors as UserError, and lists the run files in its help."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, fix='See python -m llm.main --help.')

    def format_help(self) -> str:
        runs = run_files()
        width = max((len(path) for path, _ in runs), default=0)
        lines = [f'  {path:{width}}  {comment}'.rstrip() for path, comment in runs]
        return '\n'.join((super().format_help(), 'run files:', *(lines or ['  none found']), ''))


def parse_flags(arguments: list[str]) -> argparse.Namespace:
    """The flags of `llm.main`: gin_file and gin_bindings, lists of str, and dry_run.

    Raises:
        UserError: an unknown flag, or no gin file.
    """
    parser = _Parser(
        prog='python -m llm.main',
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument('--gin_file', action='append', metavar='FILE', help='a gin file; may be repeated')
    parser.add_argument(
        '--gin_bindings',
        action='append',
        default=[],
        metavar="'NAME=VALUE'",
        help='a gin statement, strings in quotes of their own: \'FILES="my/*.txt"\'; may be repeated',
    )
    parser.add_argument('--dry_run', action='store_true', help='resolve and show everything, start nothing')
    many = parser.add_argument_group(
        'many processes',
        'TPU pods, Slurm, Open MPI and Kubernetes say these by themselves; elsewhere give all three to each, or '
        'set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. --num_processes=1 alone ignores a cluster.',
    )
    many.add_argument('--coordinator_address', metavar='HOST:PORT', help='where process 0 listens, a free port')
    many.add_argument('--num_processes', type=int, metavar='N', help='how many there are')
    many.add_argument('--process_id', type=int, metavar='I', help='which this one is, from 0')
    many.add_argument(
        '--initialization_timeout_seconds',
        type=int,
        metavar='S',
        default=INITIALIZATION_SECONDS,
        help='how long to wait until all have come (%(default)s)',
    )
    many.add_argument(
        '--heartbeat_timeout_seconds',
        type=int,
        metavar='S',
        default=HEARTBEAT_SECONDS,
        help='after how long without a sign of life a process is lost, and the others stop (%(default)s)',
    )
    flags, unknown = parser.parse_known_args(arguments)
    if unknown:
        if unknown[0].endswith('.gin') and not unknown[0].startswith('-'):
            fix = f'Did you mean --gin_file={unknown[0]}?'
        else:
            fix = suggesting.nearest(
                unknown[0].partition('=')[0], [name for action in parser._actions for name in action.option_strings]
            )
        raise UserError(f'unknown argument {unknown[0]!r}', fix=fix)
    if not flags.gin_file:
        raise UserError(
            '--gin_file is missing',
            fix='Name a run file, e.g. --gin_file=gin_configs/runs/quickstart.gin; --help lists them.',
        )
    return flags
