"""The one entry point: `python -m llm.main --gin_file=A.gin [--gin_bindings='x=y'] [--dry_run]`.

Reads the flags, resolves the gin config into a job, runs it. It knows no job by name: the gin file says which one runs.
Exit codes: 0 done; 1 a bug, with its traceback; 2 a mistake of the user's, in one line; 75 stopped before the end, by a
signal or because another process of the run was lost: the same command goes on; 130 interrupted; 141 what reads the
output (`| head`) has stopped.
"""

import importlib.metadata
import os
import select
import sys
from collections.abc import Sequence
from typing import NoReturn


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the job that the command line asks for and returns the exit code.

    Args:
        arguments: the words after the program's name; those of the process if None.
    """
    foreign = _foreign_package()
    if foreign:
        print(f'error: {foreign}', file=sys.stderr)
        return 2
    from llm.errors import UserError

    try:
        code = _run(sys.argv[1:] if arguments is None else list(arguments))
        sys.stdout.flush()
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _abandoned_output():
            raise
        return 141
    return code


def _abandoned_output() -> bool:
    """Whether nobody reads standard output any more; if so, what Python still writes there at exit goes nowhere."""
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, select.POLLOUT)
    if not any(events & select.POLLERR for _, events in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def _run(arguments: list[str]) -> int:
    from llm import configuration
    from llm.command_line import parse_flags
    from llm.parallel import processes, supervision
    from llm.parallel.accelerators import skip_absent_tpu

    flags = parse_flags(arguments)
    skip_absent_tpu()
    found = processes.find_processes(
        flags.coordinator_address,
        flags.num_processes,
        flags.process_id,
        initialization_timeout_seconds=flags.initialization_timeout_seconds,
        heartbeat_timeout_seconds=flags.heartbeat_timeout_seconds,
    )
    if found is not None and not supervision.is_supervised():
        return supervision.supervise([sys.executable, '-m', 'llm.main', *arguments], found)
    job, operative_config = configuration.load_job(flags.gin_file, flags.gin_bindings)
    with processes.joined(found):
        code = job(
            configuration.Invocation(
                dry_run=flags.dry_run,
                operative_config=operative_config,
                command=('python', '-m', 'llm.main', *arguments),
                config_files=tuple(flags.gin_file),
            )
        )
    return code or 0


def _foreign_package() -> str:
    """What is wrong, if PyPI's program `llm`, which has the same import name, is mixed with this package; else ''.

    Both install files into site-packages/llm, so whichever comes second overwrites the other's.
    """
    import llm

    here = os.path.dirname(os.path.abspath(__file__))
    remedy = 'Run pip uninstall llm llm-jax, then install llm-jax alone.'
    imported = os.path.dirname(os.path.abspath(llm.__file__ or ''))
    if imported != here:
        return f'another package called llm, in {imported}, hides the one in {here}. {remedy}'
    try:
        from llm.errors import UserError  # noqa: F401
    except ImportError:
        return f'another package called llm has overwritten files in {here}. {remedy}'
    try:
        other = importlib.metadata.distribution('llm')
    except importlib.metadata.PackageNotFoundError:
        return ''
    if os.path.realpath(str(other.locate_file('llm'))) != os.path.realpath(here):
        return ''  # elsewhere, and not what `import llm` finds: harmless
    return f"PyPI's package llm {other.version} is installed over this one in {here}. {remedy}"


def _exit(code: int) -> NoReturn:
    """Leave; a process of many that failed does not wait for the others, who cannot go on without it."""
    if code and 'llm.parallel.processes' in sys.modules:
        from llm.parallel.processes import leave_at_once

        leave_at_once(code)
    sys.exit(code)


if __name__ == '__main__':
    _exit(main())
