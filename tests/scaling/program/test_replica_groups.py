import pytest

from llm.scaling.program.replica_groups import replica_groups, source_target_pairs, spanned_axes

MESH = {'data': 2, 'fsdp': 1, 'tensor': 4}
# Along each axis of a 2 x 1 x 4 mesh in row-major order, written out by hand.
ALONG_TENSOR = ((0, 1, 2, 3), (4, 5, 6, 7))
ALONG_DATA = ((0, 4), (1, 5), (2, 6), (3, 7))
ALL = (tuple(range(8)),)


@pytest.mark.parametrize(
    ('text', 'groups'),
    [
        ('replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true', ALONG_TENSOR),
        ('replica_groups={{0,4},{1,5},{2,6},{3,7}}', ALONG_DATA),
        ('replica_groups={}', ALL),
        ('replica_groups=[2,4]<=[8]', ALONG_TENSOR),
        ('replica_groups=[4,2]<=[2,4]T(1,0), use_global_device_ids=true', ALONG_DATA),
        ('replica_groups=[1,8]<=[8]', ALL),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}", ALONG_TENSOR),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", ALONG_DATA),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", ALL),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", ALONG_DATA),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", ALONG_TENSOR),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ALONG_DATA),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", ((0, 2), (1, 3))),
        ('replica_groups=mesh[a=2,b=4] {b}', ALONG_TENSOR),
    ],
)
def test_forms_of_replica_groups(text, groups):
    assert replica_groups(f'channel_id=1, {text}, metadata={{}}', 8) == groups


def test_source_target_pairs():
    assert source_target_pairs('channel_id=1, source_target_pairs={{0,1},{1,0}}') == ((0, 1), (1, 0))


@pytest.mark.parametrize('read', [lambda text: replica_groups(text, 8), source_target_pairs])
def test_unknown_form_is_an_error(read):
    with pytest.raises(ValueError, match='channel_id'):
        read('channel_id=1, replica_groups=something new')


@pytest.mark.parametrize(
    ('groups', 'axes'),
    [
        (ALONG_TENSOR, ('tensor',)),
        (ALONG_DATA, ('data',)),
        (ALL, ('data', 'tensor')),
        (((0,), (1,)), ()),
        (((0, 1), (2, 3)), ('tensor',)),  # half of the axis
        (((0, 5), (1, 4)), ('data', 'tensor')),
    ],
)
def test_spanned_axes(groups, axes):
    assert spanned_axes(groups, MESH) == axes
