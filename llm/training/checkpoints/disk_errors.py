"""What went wrong with the disk, said to the user: full, not permitted, or broken."""

import errno
import os
import re
import shutil
from pathlib import Path

from llm.errors import UserError

# EFBIG is a limit on one file's size (`ulimit -f`, FAT): for the person it is the same as a full disk.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
# TensorStore raises ValueError and puts the number into its text.
_TENSORSTORE_ERRNO = re.compile(r"os_error_code='(\d+)'")

_FIX_FULL = (
    'Free space or lower CheckpointConfig.keep_last, then run the same command again: it resumes. '
    "With CheckpointConfig.on_full_disk = 'continue' a run goes on without the checkpoint."
)


class IncompleteSave(UserError):
    """A save that could not be finished, for want of space or because a process did not write its part.

    `CheckpointConfig.on_full_disk` says whether it ends the run.
    """


def as_user_error(error: BaseException, what: str, path: Path) -> BaseException:
    """`error`, met when `what` happened at `path`, as a UserError; `error` itself if the disk is not at fault."""
    if isinstance(error, UserError):
        return error
    number = error.errno if isinstance(error, OSError) else None
    found = _TENSORSTORE_ERRNO.search(str(error))
    if number is None and found:
        number = int(found[1])
    if number is None:
        return error
    reason = os.strerror(number)
    if number in _FULL:
        return IncompleteSave(f'{what}: the disk is full ({reason})', where=str(path), fix=_FIX_FULL)
    if number in _FORBIDDEN:
        return UserError(f'{what}: {reason}', where=str(path), fix='Set the permissions, or use another directory.')
    return UserError(f'{what}: {reason}', where=str(path), fix='Check the disk or the network file system.')


def check_space(directory: Path, size: int, what: str) -> None:
    """Refuse to begin what will need `size` bytes and cannot have them.

    Filling the disk first would take the metrics and everybody else's files down with it.

    Raises:
        IncompleteSave: the file system of `directory` has less space than that.
    """
    free = shutil.disk_usage(directory).free
    if free < size:
        reason = f'{free / 1e6:.1f} MB free, at least {size / 1e6:.1f} MB needed'
        raise IncompleteSave(f'{what}: the disk is full ({reason})', where=str(directory), fix=_FIX_FULL)
