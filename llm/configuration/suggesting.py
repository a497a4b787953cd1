"""The nearest valid name, for messages about names that do not exist."""

import difflib
from collections.abc import Iterable

_LISTED = 8  # more names than this would bury the message


def closest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that `name` is most likely a misspelling of, if any is near."""
    lowered = {candidate.lower(): candidate for candidate in candidates if candidate != name}
    matches = difflib.get_close_matches(name.lower(), lowered, n=1)
    return lowered[matches[0]] if matches else None


def nearest(name: str, candidates: Iterable[str]) -> str:
    """'Did you mean X?' for the candidate nearest to `name`; else the candidates, if they are few; else ''."""
    names = set(candidates) - {name}
    match = closest(name, names)
    return f'Did you mean {match}?' if match else listing(names)


def listing(names: Iterable[str]) -> str:
    """A sentence with all of `names`, or '' if there are none or many."""
    ordered = sorted(names)
    return f'Valid here: {", ".join(ordered)}.' if 0 < len(ordered) <= _LISTED else ''
