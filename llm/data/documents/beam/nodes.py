"""A document's place in the order of preference as a string of bytes: what is preferred sorts first.

Numbering all documents needs them sorted in one place, which no cluster should do. So records carry the key that they
would be sorted by instead: places by the rules, the id, a digest of the text, and last where the document lies, as
`corpus.merge_shards` sorts them. Comparing two such strings compares what the numbers would.
"""

import dataclasses
from collections.abc import Sequence

_PLACE = 8
_SIGN = 1 << 63
# The end of an id: a zero byte within it is followed by 255, so nothing that goes on sorts before it.
_END, _ZERO = b'\0\0', b'\0\xff'
_DIGEST, _NUMBER = 8, 4
# Keys of new documents begin with a place that is not negative, whose first byte is 128 or more.
_EARLIER = b'\0'


@dataclasses.dataclass(frozen=True, order=True)
class Position:
    """Where a prepared document lies: shard of input, piece of it, row of that piece's file."""

    shard: int
    piece: int
    row: int

    @property
    def name(self) -> str:
        """Of the file, without folder and suffix."""
        return piece_name(self.shard, self.piece)


def piece_name(shard: int, piece: int) -> str:
    """The name of the files of one piece of a shard."""
    return f'{shard:06d}-{piece:06d}'


def position(name: str, row: int) -> Position:
    """Of a row of the file of this name."""
    shard, piece = name.split('-')
    return Position(int(shard), int(piece), row)


def node(places: Sequence[int], identity: str, digest: bytes, where: Position) -> bytes:
    """The key of one document.

    Args:
        places: as `corpus.preference` gives them. digest: 8 bytes.
    """
    numbers = b''.join([(place + _SIGN).to_bytes(_PLACE, 'big') for place in places])
    last = b''.join([part.to_bytes(_NUMBER, 'big') for part in (where.shard, where.piece, where.row)])
    return numbers + identity.encode().replace(b'\0', _ZERO) + _END + digest + last


def earlier_node(number: int) -> bytes:
    """The key of a document of an earlier run: those are preferred to all others, whose place is not negative."""
    return _EARLIER + number.to_bytes(_PLACE, 'big')


def is_earlier(some: bytes) -> bool:
    """Whether a key is one of `earlier_node`."""
    return some.startswith(_EARLIER)


def earlier_number(some: bytes) -> int:
    """Of a document of an earlier run, by its key."""
    return int.from_bytes(some[len(_EARLIER) :], 'big')


def identity_of(some: bytes, places: int) -> str:
    """The id of a document by its key, which begins with so many places."""
    return some[places * _PLACE : -(len(_END) + _DIGEST + 3 * _NUMBER)].replace(_ZERO, b'\0').decode()


def position_of(some: bytes) -> Position:
    """Where a document lies, by its key."""
    last = some[-3 * _NUMBER :]
    return Position(*(int.from_bytes(last[i : i + _NUMBER], 'big') for i in range(0, len(last), _NUMBER)))
