"""The strict gin layer: gin files and bindings in, one job of typed frozen dataclasses out.

A gin file sets fields of frozen dataclasses (`decoder.DecoderConfig.num_layers = 6`), refers to configs
(`@decoder.DecoderConfig()`) and to macros (`%TOTAL_STEPS`); the macro JOB refers to the job to run. The grammar and the
meaning of scopes and macros are gin's (`gin-config`). Unlike gin alone, everything is resolved and checked before any
work: a name that does not exist, a value of the wrong type, and a setting that nothing uses are errors, each with its
file and line. How a config goes through this package: `parsing` -> `importing` -> `resolving` -> `building` ->
`rendering`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import cast

from llm.configuration.building import Builder
from llm.configuration.checking import show
from llm.configuration.files import run_files
from llm.configuration.parsing import COMMAND_LINE, Location, Statement, parse, read_statements
from llm.configuration.rendering import render
from llm.configuration.resolving import Instance, Resolver, check_required
from llm.errors import UserError

__all__ = ['COMMAND_LINE', 'Invocation', 'Job', 'load_job', 'render', 'run_files']


@dataclasses.dataclass(frozen=True)
class Invocation:
    """How a job was started.

    Attributes:
        dry_run: whether to show what would be done, and do nothing.
        operative_config: the resolved job as gin text, equal for equal jobs; a run directory's config.gin.
        command: the words of the command line.
        config_files: the --gin_file values, as given.
    """

    dry_run: bool
    operative_config: str
    command: tuple[str, ...]
    config_files: tuple[str, ...]


# It returns the exit code, None for 0.
Job = Callable[[Invocation], int | None]


def load_job(files: Sequence[str], bindings: Sequence[str] = ()) -> tuple[Job, str]:
    """The job that gin files and bindings describe, and its operative config.

    Args:
        files: gin files, later ones over earlier ones; found relative to the working directory or the package.
        bindings: gin statements (`'TOTAL_STEPS = 10'`), over the files.

    Returns:
        The job, a callable frozen dataclass, and gin text that alone reads back as the same job. The text is a function
        of the job, whatever files, macros and aliases it came from. The job is in fact the one read back, so that a
        run and its repetition from that text agree even in the types of defaults (0 for a float).

    Raises:
        UserError: something in the files or bindings is wrong; see the package's docstring.
        TypeError: a bug in a config class: its values cannot be written, or do not survive being written and read.
    """
    text = render(_resolve(read_statements(files, bindings)))
    job = _resolve(parse(text, functools.partial(Location, 'operative config')))
    if render(job) != text:
        raise TypeError(f'{type(job).__name__} changes when written and read again: see __post_init__ of its configs')
    return job, text


def _resolve(statements: Iterable[Statement]) -> Job:
    tree = Resolver(list(statements)).resolve()
    check_required(tree)
    if not isinstance(tree.content, Instance):
        problem = f'is {show(tree.content)}'
    elif not any('__call__' in vars(base) for base in tree.content.cls.__mro__):
        problem = f'refers to {tree.content.name}, which is a config but no job'
    else:
        problem = ''
    if problem:
        fix = 'Refer to one: JOB = @pretrain.Pretrain(), for example.'
        raise UserError(f'JOB {problem}', where=str(tree.setting.location), fix=fix)
    return cast(Job, Builder().build(tree))
