"""Small programs, as XLA:TPU writes them, whose bytes are counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from llm.scaling.program import hbm_bytes

KB = 4 * 16 * 16  # f32[16,16]

PLAIN = """
ENTRY %main (x: f32[16,16], y: f32[16,16]) -> f32[16,16] {
  %x = f32[16,16]{1,0} parameter(0)
  %y = f32[16,16]{1,0} parameter(1)
  ROOT %sum = f32[16,16]{1,0} add(%x, %y)
}"""
ON_CHIP = """
ENTRY %main (x: f32[16,16]) -> f32[16,16] {
  %x = f32[16,16]{1,0} parameter(0)
  %near = f32[16,16]{1,0:T(8,128)S(1)} negate(%x)
  ROOT %far = f32[16,16]{1,0:T(8,128)} negate(%near)
}"""
SLICED = """
%fused (x: f32[16,16], i: s32[]) -> f32[4,16] {
  %x = f32[16,16]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[4,16]{1,0} dynamic-slice(%x, %i, %zero), dynamic_slice_sizes={4,16}
  ROOT %double = f32[4,16]{1,0} add(%slice, %slice)
}

ENTRY %main (x: f32[16,16], i: s32[]) -> f32[4,16] {
  %x = f32[16,16]{1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  ROOT %fusion = f32[4,16]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused
}"""
UPDATED = """
%fused (x: f32[16,16], u: f32[4,16], i: s32[]) -> f32[16,16] {
  %x = f32[16,16]{1,0} parameter(0)
  %u = f32[4,16]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %update = f32[16,16]{1,0} dynamic-update-slice(%x, %u, %i, %zero)
}

ENTRY %main (x: f32[16,16], u: f32[4,16], i: s32[]) -> f32[16,16] {
  %x = f32[16,16]{1,0} parameter(0)
  %u = f32[4,16]{1,0} parameter(1)
  %i = s32[]{:S(6)} parameter(2)
  ROOT %fusion = f32[16,16]{1,0} fusion(%x, %u, %i), kind=kLoop, calls=%fused
}"""
PREFETCHED = """
ENTRY %main (x: f32[16,16]) -> f32[4,16] {
  %x = f32[16,16]{1,0} parameter(0)
  %start = ((f32[16,16]{1,0}), f32[4,16]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:4], [0:16]}
  %done = f32[4,16]{1,0:S(1)} slice-done(%start)
  ROOT %far = f32[4,16]{1,0} negate(%done)
}"""
HANDED_THROUGH = """
%fused (x: f32[16,16], y: f32[16,16]) -> (f32[16,16], f32[16,16]) {
  %x = f32[16,16]{1,0} parameter(0)
  %y = f32[16,16]{1,0} parameter(1)
  %negated = f32[16,16]{1,0} negate(%x)
  ROOT %t = (f32[16,16]{1,0}, f32[16,16]{1,0}) tuple(%negated, %y)
}

ENTRY %main (x: f32[16,16], y: f32[16,16]) -> (f32[16,16], f32[16,16]) {
  %x = f32[16,16]{1,0} parameter(0)
  %y = f32[16,16]{1,0} parameter(1)
  ROOT %fusion = (f32[16,16]{1,0}, f32[16,16]{1,0}) fusion(%x, %y), kind=kLoop, calls=%fused
}"""
LOOP = """
%body (p: (s32[], f32[16,16])) -> (s32[], f32[16,16]) {
  %p = (s32[], f32[16,16]{1,0}) parameter(0)
  %i = s32[]{:S(6)} get-tuple-element(%p), index=0
  %x = f32[16,16]{1,0} get-tuple-element(%p), index=1
  %one = s32[]{:S(6)} constant(1)
  %next = s32[]{:S(6)} add(%i, %one)
  %negated = f32[16,16]{1,0} negate(%x)
  ROOT %t = (s32[], f32[16,16]{1,0}) tuple(%next, %negated)
}

%condition (p: (s32[], f32[16,16])) -> pred[] {
  %p = (s32[], f32[16,16]{1,0}) parameter(0)
  %i = s32[]{:S(6)} get-tuple-element(%p), index=0
  %five = s32[]{:S(6)} constant(5)
  ROOT %lt = pred[]{:S(6)} compare(%i, %five), direction=LT
}

ENTRY %main (x: f32[16,16]) -> (s32[], f32[16,16]) {
  %x = f32[16,16]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %t = (s32[], f32[16,16]{1,0}) tuple(%zero, %x)
  ROOT %loop = (s32[], f32[16,16]{1,0}) while(%t), condition=%condition, body=%body
}"""


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        (PLAIN, 3 * KB),
        (ON_CHIP, 2 * KB),
        (SLICED, 2 * KB / 4),
        (UPDATED, 2 * KB / 4),
        (PREFETCHED, 2 * KB / 4),
        (HANDED_THROUGH, 2 * KB),
        (LOOP, 5 * 2 * KB),
    ],
    ids=['plain', 'on chip', 'sliced', 'updated', 'prefetched', 'handed through', 'loop'],
)
def test_bytes(text, expected):
    assert hbm_bytes(text) == expected


@pytest.mark.tpu_compile
def test_large_sum_reads_two_arrays_and_writes_one():
    """Of 1 GB each, far more than fits on chip."""
    device = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2').devices[0]
    x = jax.ShapeDtypeStruct((16_384, 16_384), jnp.float32, sharding=SingleDeviceSharding(device))
    text = jax.jit(lambda x, y: jnp.sin(x) + y).lower(x, x).compile().as_text()
    assert hbm_bytes(text) == 3 * 4 * 16_384**2
