"""The one exception type that means "the user can fix this"; everything else that escapes is a bug."""

from collections.abc import Callable

# The exit code of what stopped before its end and goes on when it is started again: EX_TEMPFAIL of sysexits.h.
TRY_AGAIN = 75


class UserError(Exception):
    """A mistake in the user's configuration, data, checkpoint, disk or mesh.

    `llm.main` prints it as one line and exits with code 2; a bug keeps its traceback.

    Args:
        what: what happened, in one clause, with the offending value.
        where: the file, line, record or binding at fault, if there is one.
        fix: what to do about it.
    """

    def __init__(self, what: str, *, where: str = '', fix: str = ''):
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what, where, fix)

    def __reduce__(self) -> tuple[Callable[..., 'UserError'], tuple[type['UserError'], str, str, str]]:
        """As processes send it to one another."""
        return _again, (type(self), self.what, self.where, self.fix)

    def __str__(self) -> str:
        line = f'{self.where}: {self.what}' if self.where else self.what
        line = f'{line}. {self.fix}' if self.fix else line
        return ' '.join(line.split())


def _again(cls: type[UserError], what: str, where: str, fix: str) -> UserError:
    return cls(what, where=where, fix=fix)
