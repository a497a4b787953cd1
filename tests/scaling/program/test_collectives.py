"""Programs whose collectives are counted by hand, on a 2 x 4 mesh of simulated devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import mesh_utils, topologies
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from llm.scaling.program import read_program

P = PartitionSpec
ROWS, COLUMNS = 16, 32  # 8 x 8 floats, 256 bytes, on each of 2 x 4 devices
SHARD = 8 * 8 * 4


@pytest.fixture(scope='module')
def mesh():
    return jax.make_mesh((2, 4), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2)


def compiled(function, mesh, out_specs=P('data', 'tensor')):
    """The program of a function of one device's [8, 8] part."""
    mapped = jax.shard_map(function, mesh=mesh, in_specs=P('data', 'tensor'), out_specs=out_specs, check_vma=False)
    return jax.jit(mapped).lower(jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32)).compile().as_text()


def only(program):
    (collective,) = program.collectives
    return collective


@pytest.mark.parametrize(('axes', 'size'), [(('data',), 2), (('tensor',), 4), (('data', 'tensor'), 8)])
def test_psum_along_each_axis(mesh, axes, size):
    found = only(read_program(compiled(lambda x: jax.lax.psum(x, axes), mesh), mesh))
    assert (found.kind, found.axes, found.group_size, found.count) == ('all-reduce', axes, size, 1)
    assert found.payload == SHARD and found.element_type == 'f32'
    assert found.link_bytes == 2 * SHARD * (size - 1) / size
    assert not found.asynchronous and not found.across_slices


def test_all_gather_counts_the_whole_array(mesh):
    program = compiled(lambda x: jax.lax.all_gather(x, 'tensor', axis=1, tiled=True), mesh, P('data', None))
    found = only(read_program(program, mesh))
    assert (found.kind, found.axes, found.shapes[0].dimensions) == ('all-gather', ('tensor',), (8, 32))
    assert found.payload == 4 * SHARD and found.link_bytes == 3 * SHARD


def test_reduce_scatter_counts_the_whole_array(mesh):
    program = compiled(lambda x: jax.lax.psum_scatter(x, 'tensor', tiled=True), mesh)
    found = only(read_program(program, mesh))
    assert (found.kind, found.axes, found.payload) == ('reduce-scatter', ('tensor',), SHARD)
    assert found.link_bytes == 3 / 4 * SHARD


def test_all_to_all(mesh):
    program = compiled(lambda x: jax.lax.all_to_all(x, 'tensor', 0, 1, tiled=True), mesh)
    found = only(read_program(program, mesh))
    assert (found.kind, found.axes, found.group_size) == ('all-to-all', ('tensor',), 4)
    assert found.payload == SHARD and found.link_bytes == 3 / 4 * SHARD


def test_ppermute(mesh):
    shift = [(i, (i + 1) % 2) for i in range(2)]
    found = only(read_program(compiled(lambda x: jax.lax.ppermute(x, 'data', shift), mesh), mesh))
    assert (found.kind, found.axes) == ('collective-permute', ('data',))
    assert found.payload == found.link_bytes == SHARD


def test_scans_multiply(mesh):
    def function(x):
        def inner(x, _):
            return jax.lax.psum(x, 'data') * 0.5, None

        def outer(x, _):
            x = jax.lax.all_gather(x, 'tensor', tiled=True)[:8] + jax.lax.scan(inner, x, None, length=5)[0]
            return x, None

        return jax.lax.scan(outer, x, None, length=3)[0]

    program = read_program(compiled(function, mesh), mesh)
    assert {each.kind: each.count for each in program.collectives} == {'all-reduce': 15, 'all-gather': 3}
    rows = {row.kind: row for row in program.traffic()}
    assert rows['all-reduce'].executions == 15 and rows['all-reduce'].payload == 15 * SHARD
    assert rows['all-gather'].payload == 3 * 4 * SHARD and rows['all-gather'].link_bytes == 3 * 3 * SHARD
    assert program.unknown_loops == ()


@pytest.mark.parametrize(('first', 'last', 'trips'), [(0, 7, 7), (2, 7, 5), (7, 7, 0)])
def test_trips_of_a_loop_without_the_compilers_own_count(mesh, first, last, trips):
    def function(x):
        return jax.lax.fori_loop(first, last, lambda i, x: jax.lax.psum(x, 'data') + i, x)

    text = compiled(function, mesh)
    read = read_program(text.replace('"known_trip_count"', '"something_else"'), mesh)
    assert sum(each.count for each in read.collectives) == trips
    assert read.unknown_loops == ()
    assert read == read_program(text, mesh)


def test_loop_that_ends_by_its_data_is_named(mesh):
    def function(x):
        return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: jax.lax.psum(x, 'data') - 1, x)

    program = read_program(compiled(function, mesh), mesh)
    assert only(program).count == 1
    assert len(program.unknown_loops) == 1


def test_most_expensive_branch_counts(mesh):
    def function(x):
        branches = (
            lambda x: jax.lax.psum(x, 'data'),
            lambda x: jax.lax.psum(x, ('data', 'tensor')),
            lambda x: x,
        )
        return jax.lax.switch(jnp.int32(x[0, 0]), branches, x)

    assert only(read_program(compiled(function, mesh), mesh)).axes == ('data', 'tensor')


def test_compiler_placed_collective_of_a_sharded_product(mesh):
    """x [B, F] @ w [F, D] with F over tensor: XLA adds an all-reduce of [B, D] along it."""
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, P('data', 'tensor')))
    w = jax.ShapeDtypeStruct((64, 24), jnp.float32, sharding=NamedSharding(mesh, P('tensor', None)))
    product = jax.jit(jnp.matmul, out_shardings=NamedSharding(mesh, P('data', None)))
    found = only(read_program(product.lower(x, w).compile().as_text(), mesh))
    assert (found.kind, found.axes, found.payload) == ('all-reduce', ('tensor',), 8 * 24 * 4)


def test_mesh_whose_devices_are_in_another_order():
    """What counts is a device's place in the mesh, not its id."""
    devices = jax.devices()[::-1]
    mesh = jax.make_mesh((2, 4), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2, devices=devices)
    assert only(read_program(compiled(lambda x: jax.lax.psum(x, 'data'), mesh), mesh)).axes == ('data',)


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match='ENTRY'):
        read_program('HloModule nothing', AbstractMesh((1,), ('data',)))


# As XLA:TPU and XLA:GPU write them; the CPU has none of these.
ASYNCHRONOUS = {
    'start and done': """
ENTRY %main (x: bf16[4,8]) -> bf16[16,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %start = (bf16[4,8], bf16[16,8]) all-gather-start(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %done = bf16[16,8]{1,0} all-gather-done(%start)
}""",
    'wrapped': """
%wrapped (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[16,8]{1,0} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}

ENTRY %main (x: bf16[4,8]) -> bf16[16,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %start = ((bf16[4,8]{1,0}), bf16[16,8]{1,0}, u32[]{:S(2)}) async-start(%x), calls=%wrapped
  ROOT %done = bf16[16,8]{1,0} async-done(%start), calls=%wrapped
}""",
    'in fusions': """
%begin (p: bf16[4,8]) -> (bf16[4,8], bf16[16,8], u32[]) {
  %p = bf16[4,8]{1,0} parameter(0)
  %all-gather.1 = bf16[16,8]{1,0} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %c.1 = (bf16[4,8], bf16[16,8], u32[]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (a: bf16[4,8], b: bf16[16,8], u: u32[], y: f32[8]) -> (f32[8], bf16[16,8]) {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = bf16[16,8]{1,0} parameter(1)
  %u = u32[]{:S(2)} parameter(2)
  %y = f32[8]{0} parameter(3)
  %double = f32[8]{0} add(%y, %y)
  %all-gather.2 = bf16[16,8]{1,0} all-gather(%a), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %t = (f32[8]{0}, bf16[16,8]{1,0}) tuple(%double, %all-gather.2)
}

%end (a: bf16[4,8], b: bf16[16,8]) -> bf16[16,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = bf16[16,8]{1,0} parameter(1)
  %all-gather.3 = bf16[16,8]{1,0} all-gather(%a), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %c.2 = bf16[16,8]{1,0} custom-call(%a, %b, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: bf16[4,8], y: f32[8]) -> bf16[16,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %start = (bf16[4,8]{1,0}, bf16[16,8]{1,0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, calls=%begin
  %g0 = bf16[4,8]{1,0} get-tuple-element(%start), index=0
  %g1 = bf16[16,8]{1,0} get-tuple-element(%start), index=1
  %g2 = u32[]{:S(2)} get-tuple-element(%start), index=2
  %beside = (f32[8]{0}, bf16[16,8]{1,0}) fusion(%g0, %g1, %g2, %y), kind=kCustom, calls=%async_collective_fusion.1
  %g3 = bf16[16,8]{1,0} get-tuple-element(%beside), index=1
  ROOT %done = bf16[16,8]{1,0} fusion(%g0, %g3), kind=kCustom, calls=%end
}""",
}


@pytest.mark.parametrize('text', ASYNCHRONOUS.values(), ids=ASYNCHRONOUS)
def test_asynchronous_forms_are_one_collective(text):
    found = only(read_program(text, AbstractMesh((2, 4), ('data', 'tensor'))))
    assert (found.kind, found.axes, found.count, found.asynchronous) == ('all-gather', ('tensor',), 1, True)
    assert found.payload == 16 * 8 * 2


def test_fused_all_reduce_and_slice_is_a_reduce_scatter():
    text = """
%all-reduce-scatter (p: bf16[16,8]) -> bf16[4,8] {
  %p = bf16[16,8]{1,0} parameter(0)
  %all-reduce.1 = bf16[16,8]{1,0} all-reduce(%p), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  %zero = s32[] constant(0)
  ROOT %slice = bf16[4,8]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={4,8}
}

ENTRY %main (x: bf16[16,8]) -> bf16[4,8] {
  %x = bf16[16,8]{1,0} parameter(0)
  ROOT %fusion = bf16[4,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter
}"""
    found = only(read_program(text, AbstractMesh((2, 4), ('data', 'tensor'))))
    assert (found.kind, found.payload, found.link_bytes) == ('reduce-scatter', 256, 192)


@pytest.fixture(scope='module')
def two_slices():
    """Two slices of four chips: `data` between them, `fsdp` within."""
    devices = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2', num_slices=2).devices
    devices = mesh_utils.create_hybrid_device_mesh((1, 4), (2, 1), devices)
    return Mesh(devices, ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.tpu_compile
def test_sums_within_and_between_slices(two_slices):
    """Each chip has [8, 256] of x: summed over the four of its slice, then over both slices."""

    def function(x):
        return jax.lax.psum(jax.lax.psum(x, 'fsdp'), 'data')

    mapped = jax.shard_map(function, mesh=two_slices, in_specs=P(('data', 'fsdp')), out_specs=P())
    x = jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=NamedSharding(two_slices, P(('data', 'fsdp'))))
    program = read_program(jax.jit(mapped).lower(x).compile().as_text(), two_slices)
    assert [(each.kind, each.axes, each.across_slices, each.group_size) for each in program.collectives] == [
        ('all-reduce', ('fsdp',), False, 4),
        ('all-reduce', ('data',), True, 2),
    ]
    assert [each.payload for each in program.collectives] == [8 * 256 * 4] * 2
