"""One pipeline: built, run to its end, and its failure told as the user's mistake where it is one."""

import contextlib
import io
import logging
import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llm.errors import UserError

# What a worker of the runner for one machine is started as, in a process of its own, below a shell.
_WORKER = b'apache_beam.runners.worker.sdk_worker_main'
_LOG_LEVEL = '--default_sdk_harness_log_level'


def new_pipeline(options: Sequence[str]) -> Any:
    """A pipeline without steps.

    Raises:
        UserError: Beam is not installed, or an option is unknown or refused.
    """
    if _local(options) and not any(option.startswith(_LOG_LEVEL) for option in options):
        # Hundreds of lines about its own start would hide the one that matters; clusters say where their page is.
        logging.getLogger('apache_beam').setLevel(logging.ERROR)
        options = (*options, f'{_LOG_LEVEL}=ERROR')
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # Beam tells the root logger that it does without BigQuery
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(
            'the package apache-beam is not installed', fix="pip install 'llm-jax[beam]' brings it."
        ) from error
    finally:
        logging.disable(disabled)
    # Beam itself leaves out what it does not know, with a warning.
    for before, option in zip(['', *options], options, strict=False):
        if not option.startswith('--') and (not before.startswith('--') or '=' in before):
            raise UserError(f'{option!r} is no option', where='Beam.options', fix="Write it as '--name=value'.")
    usage = io.StringIO()
    try:
        with contextlib.redirect_stderr(usage):
            parsed = PipelineOptions(list(options))
            known = PipelineOptions([]).get_all_options()
            unknown = sorted(parsed.get_all_options(retain_unknown_options=True).keys() - known.keys())
        if unknown:
            raise UserError(f'no runner of Beam knows {", ".join(unknown)}', where='Beam.options')
        return apache_beam.Pipeline(options=parsed)
    except (SystemExit, ValueError) as error:
        said = error if isinstance(error, ValueError) else usage.getvalue().rpartition('error: ')[2].strip()
        raise UserError(f'Beam refuses the options ({said})', where='Beam.options') from error


def run(name: str, options: Sequence[str], add: Callable[[Any], None]) -> dict[str, Any]:
    """Runs a pipeline of the steps that `add` adds; returns the size of the largest group that any of them read.

    Raises:
        UserError: as `new_pipeline`; or a worker met a mistake of the user, or the pipeline failed or was cancelled.
    """
    pipeline = new_pipeline(options)
    add(pipeline)
    try:
        with interruptible() if _in_processes(options) else contextlib.nullcontext():
            result = pipeline.run()
            state = result.wait_until_finish()
    except Exception as error:
        # Beam adds the step to what an error says; runners in other processes give the traceback as a text.
        if isinstance(error, UserError):
            raise UserError(error.what, where=error.where, fix=error.fix) from error
        if isinstance(error, OSError):
            fix = 'Check space, permissions and the net; the same command goes on.'
            raise UserError(f'the pipeline {name} failed ({error})', fix=fix) from error
        said = re.findall(r'llm\.errors\.UserError: (.*)|llm\.\S+\.UnreadableFile: (.*)', str(error))
        if said:
            raise UserError(''.join(said[-1]).strip()) from error
        below = traceback.extract_tb(error.__traceback__)[1:]
        if any('/llm/' in frame.filename for frame in below) or 'llm/' in str(error):
            raise  # a mistake in what the pipeline does
        first = str(error).partition('\n')[0][:500]
        raise UserError(f'its runner failed ({type(error).__name__}: {first})', where='Beam.options') from error
    if str(state) != 'DONE':
        raise UserError(f'the pipeline {name} ended as {state}', fix='Its runner says why; the same command goes on.')
    return {'largest_group': _largest_group(result)}


def _local(options: Sequence[str]) -> bool:
    """Whether the pipeline runs on this machine: no runner is named, or DirectRunner."""
    words = ' '.join(options).replace('=', ' ').split()
    return '--runner' not in words or 'DirectRunner' in words


def _in_processes(options: Sequence[str]) -> bool:
    return _local(options) and 'multi_processing' in ' '.join(options).replace('=', ' ').split()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ends the workers at SIGINT: the runner, on its way out, waits for them for ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    hook, executable = threading.excepthook, sys.executable

    def interrupt(*_: Any) -> None:
        # Threads of the runner tell with tracebacks that a worker is gone.
        threading.excepthook = lambda _: None
        logging.getLogger('apache_beam').setLevel(logging.CRITICAL + 1)
        _kill_workers()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    # A terminal sends SIGINT to workers as well, which would tell of it with tracebacks. Beam has a shell start them by
    # this name; nothing but what a shell ignores outlives it.
    sys.executable = f"trap '' INT; exec {shlex.quote(executable)}"
    try:
        yield
    finally:
        sys.executable = executable
        signal.signal(signal.SIGINT, before)
        threading.excepthook = hook


def _kill_workers() -> None:
    """Kills the processes below this one that are workers of Beam, and their shells."""
    parents: dict[int, int] = {}
    for status in Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parents[int(status.parent.name)] = int(status.read_text().rpartition(')')[2].split()[1])
    for process, parent in parents.items():
        above = parent
        while above not in (0, os.getpid()):
            above = parents.get(above, 0)
        with contextlib.suppress(OSError):
            if above and _WORKER in Path(f'/proc/{process}/cmdline').read_bytes():
                os.kill(process, signal.SIGKILL)


def _largest_group(result: Any) -> int:
    from apache_beam.metrics.metric import MetricsFilter

    found = result.metrics().query(MetricsFilter().with_namespace('llm.documents'))['distributions']
    return max((some.committed.max for some in found if some.committed), default=0)
