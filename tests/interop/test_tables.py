"""The little language of tables: einops is its oracle, and reading is the inverse of writing."""

import numpy as np
import pytest

from llm.interop.tables import Row, links, shapes
from llm.models.parameters import ParameterSpec, Role


def spec(*shape: int, layers: bool = True) -> ParameterSpec:
    axes = tuple(f'axis{i}' for i in range(len(shape)))
    return ParameterSpec(shape, ('layers', *axes[1:]) if layers else axes, Role.VECTOR, outputs=(len(shape) - 1,))


def table_links(rows, specs, num_layers=2):
    return links(rows, specs, num_layers, lambda i: ('layers', '0', i))


def values(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize(
    ('axes', 'ours', 'theirs', 'expected'),
    [
        ('', (3, 4), (3, 4), lambda x: x),
        ('F D -> D F', (3, 4), (4, 3), lambda x: x.T),
        ('(H K) D -> D H K', (5, 2, 3), (6, 5), lambda x: x.reshape(2, 3, 5).transpose(2, 0, 1)),
        ('D (H K) -> H K D', (2, 3, 5), (5, 6), lambda x: x.reshape(5, 2, 3).transpose(1, 2, 0)),
        # Rotary halves: theirs are neighbours, ours are halves of the head.
        (
            '(H k 2) D -> D H (2 k)',
            (5, 2, 6),
            (12, 5),
            lambda x: x.reshape(2, 3, 2, 5).transpose(3, 0, 2, 1).reshape(5, 2, 6),
        ),
        ('C 1 W -> W C', (4, 3), (3, 1, 4), lambda x: x[:, 0].T),
        ('(...) 1 W -> W ...', (4, 3, 2), (6, 1, 4), lambda x: x[:, 0].T.reshape(4, 3, 2)),
        ('D (...) -> ... D', (3, 5), (5, 3), lambda x: x.T),
    ],
)
def test_one_parameter(axes, ours, theirs, expected):
    (link,) = table_links((Row('w', 't', axes),), {'w': spec(*ours, layers=False)})
    assert link.layout.theirs == theirs
    tensor = values(*theirs)
    np.testing.assert_array_equal(link.read(tensor), expected(tensor))
    back = np.empty(theirs, np.float32)
    link.write(back, link.read(tensor))
    np.testing.assert_array_equal(back, tensor)


def test_reading_looks_only_at_what_is_asked_for():
    (link,) = table_links((Row('w', 't', '(H K) D -> D H K'),), {'w': spec(5, 2, 3, layers=False)})
    tensor = values(6, 5)
    assert np.shares_memory(link.read(tensor), tensor)


@pytest.mark.parametrize(
    ('axes', 'join'),
    [
        ('(* H K) D -> D H K', lambda q, k, v: np.concatenate([q, k, v])),
        (
            '(H * K) D -> D H K',
            lambda q, k, v: np.stack([x.reshape(2, 3, 5) for x in (q, k, v)], axis=1).reshape(18, 5),
        ),
        ('* (H K) D -> D H K', lambda q, k, v: np.stack([q, k, v])),
    ],
)
def test_parts_of_one_tensor(axes, join):
    specs = {name: spec(5, 2, 3, layers=False) for name in 'qkv'}
    found = table_links((Row(('q', 'k', 'v'), 't', axes),), specs)
    parts = [values(6, 5) + 100 * i for i in range(3)]
    tensor = join(*parts)
    assert found[0].layout.theirs == tensor.shape
    for link, part in zip(found, parts, strict=True):
        np.testing.assert_array_equal(link.read(tensor), part.reshape(2, 3, 5).transpose(2, 0, 1))
    back = np.zeros_like(tensor)
    for link in found:
        link.write(back, link.read(tensor))
    np.testing.assert_array_equal(back, tensor)


def test_parts_may_differ_in_size():
    specs = {'q': spec(5, 4, 3, layers=False), 'k': spec(5, 2, 3, layers=False)}
    query, key = table_links((Row(('q', 'k'), 't', '(* H K) D -> D H K'),), specs)
    tensor = values(18, 5)
    np.testing.assert_array_equal(query.read(tensor), tensor[:12].reshape(4, 3, 5).transpose(2, 0, 1))
    np.testing.assert_array_equal(key.read(tensor), tensor[12:].reshape(2, 3, 5).transpose(2, 0, 1))


def test_parts_may_differ_in_their_number_of_axes():
    specs = {'x': spec(5, 4, 3, layers=False), 'b': spec(5, 2, 2, layers=False), 'dt': spec(5, 4, layers=False)}
    found = table_links((Row(('x', 'b', 'dt'), 't', '(* ...) D -> D ...'),), specs)
    tensor = values(12 + 4 + 4, 5)
    assert {link.layout.theirs for link in found} == {tensor.shape}
    expected = [tensor[:12].T.reshape(5, 4, 3), tensor[12:16].T.reshape(5, 2, 2), tensor[16:].T]
    back = np.zeros_like(tensor)
    for link, piece in zip(found, expected, strict=True):
        np.testing.assert_array_equal(link.read(tensor), piece)
        link.write(back, piece)
    np.testing.assert_array_equal(back, tensor)
    with pytest.raises(ValueError, match='the parts differ in dimension 1'):
        table_links((Row(('x', 'o'), 't', '(* ...) D -> D ...'),), specs | {'o': spec(6, 4, layers=False)})


def test_rows_for_one_kind_of_layer():
    specs = {'0': {'out': spec(1, 3, 2), 'heads': spec(1, 3)}, '1': {'out': spec(1, 3, 2), 'states': spec(1, 3)}}
    rows = (
        Row('out', 'l.{layer}.attention.out', beside='heads'),
        Row('out', 'l.{layer}.mamba.out', 'A B -> B A', beside='states'),
        Row('heads', 'l.{layer}.heads'),
        Row('states', 'l.{layer}.states'),
    )
    found = links(rows, {'layers': specs}, 2, lambda i: ('layers', str(i), 0))
    assert shapes(found) == {
        'l.0.attention.out': (3, 2),
        'l.0.heads': (3,),
        'l.1.mamba.out': (2, 3),
        'l.1.states': (3,),
    }


def test_layers_and_spread_axes_are_counted_in_the_name():
    specs = {'layers': {'0': {'up': spec(2, 3, 5, 4)}}, 'out': spec(4, layers=False)}
    rows = (Row('up', 'l.{layer}.experts.{E}.up', 'F D -> E D F'), Row('out', 'out'))
    found = table_links(rows, specs)
    assert shapes(found) == {'out': (4,)} | {f'l.{i}.experts.{e}.up': (4, 5) for i in range(2) for e in range(3)}
    assert [(link.name, link.index) for link in found[1:3]] == [
        ('l.0.experts.0.up', (0, 0)),
        ('l.0.experts.1.up', (0, 1)),
    ]


def test_offset_is_added_on_the_way_out():
    (link,) = table_links((Row('w', 't', offset=1.0),), {'w': spec(3, layers=False)})
    out = np.empty(3, np.float32)
    link.write(out, np.array([0.5, 0.0, -0.5], np.float32))
    np.testing.assert_array_equal(out, [1.5, 1.0, 0.5])


def test_rows_of_absent_parameters_are_passed_over_and_holes_in_a_table_are_found():
    specs = {'layers': {'0': {'w': spec(2, 3)}}}
    assert len(table_links((Row('w', 'l.{layer}.w'), Row('b', 'l.{layer}.b')), specs)) == 2
    with pytest.raises(ValueError, match='0 rows for layers/0/w'):
        table_links((), specs)
    with pytest.raises(ValueError, match='4 rows for layers/0/w instead of 2'):
        table_links((Row('w', 'l.{layer}.w'), Row('w', 'l.{layer}.again')), specs)
    with pytest.raises(ValueError, match='has only some'):
        table_links((Row(('w', 'v'), 'l.{layer}.w', '(* D) -> D'),), specs)


@pytest.mark.parametrize(
    'axes', ['A -> A', 'A B C -> A B C', 'A B C ... -> C A B ...', '(A B) C -> C A', 'A A -> A A', '(A 3) B -> A B']
)
def test_tables_that_do_not_fit_are_refused(axes):
    with pytest.raises(ValueError, match='axes|fit|dimensions'):
        table_links((Row('w', 't', axes),), {'w': spec(4, 5, layers=False)})
