"""Groups of any size, in bounded memory: every member of a group is told what a combiner makes of the whole of it.

A group is spread over `salts` parts by a hash of its members. Each part is combined where its members lie, the few
results of a key are combined to one, and that goes back to the parts in which the key has members. So no list is longer
than `salts`, or than a group's members divided by it, and those are read one after the other, twice, and not held.
"""

import bisect
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
from apache_beam.metrics.metric import Metrics

# Name and payload; the order of names is that of preference.
Member = tuple[bytes, Any]
Told = tuple[bytes, Member, Any, int]
_SALT = 2
# The largest group that any step has read: a metric of every pipeline.
GROUPS = Metrics.distribution('llm.documents', 'group')


def watched(members: Iterable[Any]) -> Iterator[Any]:
    """The members of a group, which the metric counts."""
    number = 0
    for member in members:
        number += 1
        yield member
    GROUPS.update(number)


class Smallest(beam.CombineFn):
    """The `k` smallest names, in order; with k = 1 the smallest."""

    def __init__(self, k: int):
        super().__init__()
        self._k = k

    def create_accumulator(self) -> list[bytes]:
        return []

    def add_input(self, accumulator: list[bytes], member: Member) -> list[bytes]:
        if len(accumulator) < self._k:
            bisect.insort(accumulator, member[0])
        elif member[0] < accumulator[-1]:
            accumulator.pop()
            bisect.insort(accumulator, member[0])
        return accumulator

    def merge_accumulators(self, accumulators: Iterable[list[bytes]]) -> list[bytes]:
        return sorted(name for some in accumulators for name in some)[: self._k]

    def extract_output(self, accumulator: list[bytes]) -> list[bytes]:
        return accumulator


class Given(beam.CombineFn):
    """The payload of the one member without a name, which is what the others are told; None where there is none."""

    def create_accumulator(self) -> Any:
        return None

    def add_input(self, accumulator: Any, member: Member) -> Any:
        return accumulator if member[0] else member[1]

    def merge_accumulators(self, accumulators: Iterable[Any]) -> Any:
        return next((some for some in accumulators if some is not None), None)

    def extract_output(self, accumulator: Any) -> Any:
        return accumulator


class _Counted(beam.CombineFn):
    """How many there are, and the accumulator of another combiner, which is not extracted yet."""

    def __init__(self, inner: beam.CombineFn):
        super().__init__()
        self._inner = inner

    def create_accumulator(self) -> Any:
        return 0, self._inner.create_accumulator()

    def add_input(self, accumulator: Any, member: Member) -> Any:
        return accumulator[0] + 1, self._inner.add_input(accumulator[1], member)

    def merge_accumulators(self, accumulators: Iterable[Any]) -> Any:
        some = list(accumulators)
        return sum(count for count, _ in some), self._inner.merge_accumulators([inner for _, inner in some])

    def extract_output(self, accumulator: Any) -> Any:
        return accumulator


class Tell(beam.PTransform):
    """(key, member) -> (key, member, result, count) of each member that has a name.

    Args:
        combiner: of members; what it holds is bounded.
        least: members of smaller groups are told nothing, and left out.
    """

    def __init__(self, combiner: beam.CombineFn, salts: int, least: int = 1):
        super().__init__()
        self._combiner, self._salts, self._least = combiner, salts, least

    def expand(self, members: Any) -> Any:
        salted = members | 'salt' >> beam.Map(_salted, self._salts)
        results = (
            salted
            | 'parts' >> beam.CombinePerKey(_Counted(self._combiner))
            | 'by key' >> beam.Map(_by_key)
            | 'collect' >> beam.GroupByKey()
            | 'whole' >> beam.FlatMap(_whole, self._combiner, self._least)
        )
        named = salted | 'named' >> beam.Filter(_named) | 'as member' >> beam.Map(_as_member)
        return (named, results) | beam.Flatten() | 'meet' >> beam.GroupByKey() | 'tell' >> beam.FlatMap(_told)


def _salted(element: tuple[bytes, Member], salts: int) -> tuple[bytes, Member]:
    key, member = element
    return key + (zlib.crc32(member[0]) % salts).to_bytes(_SALT, 'big'), member


def _named(element: tuple[bytes, Member]) -> bool:
    return bool(element[1][0])


def _as_member(element: tuple[bytes, Member]) -> tuple[bytes, tuple[bool, Any, int]]:
    return element[0], (False, element[1], 0)


def _by_key(element: tuple[bytes, Any]) -> tuple[bytes, tuple[bytes, Any]]:
    return element[0][:-_SALT], (element[0][-_SALT:], element[1])


def _whole(
    element: tuple[bytes, Iterable[tuple[bytes, Any]]], combiner: beam.CombineFn, least: int
) -> Iterator[tuple[bytes, tuple[bool, Any, int]]]:
    key, parts = element[0], list(watched(element[1]))
    count = sum(number for _, (number, _) in parts)
    if count >= least:
        result = combiner.extract_output(combiner.merge_accumulators([inner for _, (_, inner) in parts]))
        for salt, _ in parts:
            yield key + salt, (True, result, count)


def _told(element: tuple[bytes, Iterable[tuple[bool, Any, int]]]) -> Iterator[Told]:
    key, group = element
    told = next(((result, count) for is_result, result, count in group if is_result), None)
    if told is None:
        return
    for is_result, member, _ in watched(group):
        if not is_result:
            yield key[:-_SALT], member, *told


class Without(beam.PTransform):
    """Of (key, value), each key there once, those whose key is not the key of any of `others`, there once as well."""

    def __init__(self, others: Any):
        super().__init__()
        self._others = others

    def expand(self, some: Any) -> Any:
        gone = self._others | 'name' >> beam.Map(_without_value)
        return (some, gone) | beam.CoGroupByKey() | 'drop' >> beam.FlatMap(_alone)


def _without_value(element: tuple[bytes, Any]) -> tuple[bytes, None]:
    return element[0], None


def _alone(element: tuple[bytes, tuple[Iterable[Any], Iterable[None]]]) -> Iterator[tuple[bytes, Any]]:
    key, (values, gone) = element
    if not list(watched(gone)):
        for value in watched(values):
            yield key, value


class Join(beam.PTransform):
    """(members, values): (key, member) with (key, value), a value at most for each key, any number of members.

    Gives (key, member, value or None, count).
    """

    def __init__(self, salts: int):
        super().__init__()
        self._salts = salts

    def expand(self, both: Any) -> Any:
        members, values = both
        unnamed = values | 'unnamed' >> beam.Map(_unnamed)
        return (members, unnamed) | 'members and values' >> beam.Flatten() | 'tell' >> Tell(Given(), self._salts)


def _unnamed(element: tuple[bytes, Any]) -> tuple[bytes, Member]:
    return element[0], (b'', element[1])
