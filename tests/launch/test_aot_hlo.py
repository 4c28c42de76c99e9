"""What is counted in compiled programs: against hand-written text, and against programs of which it is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from launch import aot_hlo
from launch.aot_hlo import Collective, collectives, hbm_bytes, parse, size
from slm_jax import sharding

TEXT = """HloModule jit_f, is_scheduled=true

%fused (p.0: f32[8,100], p.1: s32[]) -> f32[1,100] {
  %p.0 = f32[8,100]{1,0:T(8,128)} parameter(0)
  %p.1 = s32[]{:T(128)} parameter(1)
  ROOT %slice.1 = f32[1,100]{1,0:T(1,128)S(1)} dynamic-slice(%p.0, %p.1), dynamic_slice_sizes={1,100}
}

%condition (state: (s32[], f32[8,100])) -> pred[] {
  %state = (s32[]{:T(128)}, f32[8,100]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %n = s32[]{:T(128)} constant(8)
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (state: (s32[], f32[8,100])) -> (s32[], f32[8,100]) {
  %state.1 = (s32[]{:T(128)}, f32[8,100]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %x.1 = f32[8,100]{1,0:T(8,128)} get-tuple-element(%state.1), index=1
  %row = f32[1,100]{1,0:T(1,128)S(1)} fusion(%x.1, %i.1), kind=kLoop, calls=%fused
  %sum.1 = f32[1,100]{1,0:T(1,128)S(1)} all-reduce(%row), channel_id=1, replica_groups={{0,2},{1,3}}, to_apply=%add
  ROOT %next = (s32[]{:T(128)}, f32[8,100]{1,0:T(8,128)}) tuple(%i.1, %x.1)
}

ENTRY %main (x: f32[8,100]) -> f32[8,100] {
  %x = f32[8,100]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, f32[8,100]{1,0:T(8,128)}) tuple(%zero, %x)
  %loop = (s32[]{:T(128)}, f32[8,100]{1,0:T(8,128)}) while(%start), condition=%condition, body=%body
  %y = f32[8,100]{1,0:T(8,128)} get-tuple-element(%loop), index=1
  %kernel = f32[8,100]{1,0:T(8,128)} custom-call(%y), custom_call_target="tpu_custom_call", metadata={
"a":"{\\"b\\": 1}"
}}, backend_config={}
  %near = f32[8,100]{1,0:T(8,128)S(1)} all-gather(%kernel), channel_id=2, replica_groups=mesh['a'=2,'b'=2] {'b'}
  %out = (f32[8,100]{1,0:T(8,128)}, u32[], token[]) send(%kernel, %token), channel_id=3, CROSSING="ALL_REDUCE"
  %in = (f32[8,100]{1,0:T(8,128)}, u32[], token[]) recv(%token), channel_id=4, CROSSING="ALL_REDUCE"
  ROOT %twice = f32[8,100]{1,0:T(8,128)} add(%kernel, %near)
}
""".replace('CROSSING', '_xla_megascale_transfer_type')


def test_loops_are_multiplied_out_and_what_crosses_slices_is_sent():
  found = {(one.kind, one.slices): one for one in collectives(TEXT, devices=8, slices=2)}
  assert found.pop(('all-reduce', 1)) == Collective('all-reduce', group=2, slices=1, times=8, bytes=8 * 400)
  assert found.pop(('all-gather', 1)) == Collective('all-gather', group=2, slices=1, times=1, bytes=3200)
  assert found.pop(('all-reduce', 2)) == Collective('all-reduce', group=2, slices=2, times=1, bytes=3200)
  assert not found


def test_traffic_is_what_leaves_and_enters_hbm():
  rows, kernel, gathered, added = 8 * (400 + 4), 2 * 3200, 3200, 2 * 3200
  sent_and_received = 3200 + 3200 + 4
  assert hbm_bytes(TEXT) == rows + kernel + gathered + added + sent_and_received


def test_a_kernels_metadata_does_not_end_a_computation():
  computations, entry = parse(TEXT)
  assert entry == 'main'
  assert 'twice' in computations['main']
  assert len(computations) == 4


@pytest.mark.parametrize(
  'shape, expected, in_hbm',
  [
    ('f32[]', 4, 4),
    ('bf16[2,3]{1,0:T(8,128)(2,1)}', 12, 12),
    ('(s32[2]{0}, /*index=1*/pred[5]{0:S(1)})', 13, 8),
    ('u32[]{:S(2)}', 4, 0),
  ],
)
def test_sizes(shape, expected, in_hbm):
  assert size(shape) == expected
  assert size(shape, in_hbm=True) == in_hbm


@pytest.mark.parametrize(
  'groups, expected',
  [
    ('{{0,1,2,3},{4,5,6,7}}', [0, 1, 2, 3]),
    ('[4,2]<=[8]', [0, 1]),
    ('[4,2]<=[2,4]T(1,0)', [0, 4]),
    ("mesh['a'=2,'b'=4] {'a'}", [0, 4]),
    ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", [0, 4]),
    ("mesh['a'=4,'b'=2] {'a','b'}", [0, 1, 2, 3, 4, 5, 6, 7]),
  ],
)
def test_groups_in_all_their_spellings(groups, expected):
  assert aot_hlo._first_group(f', channel_id=1, replica_groups={groups}, dimensions={{1}}', 8) == expected


@pytest.mark.parametrize(
  'kind, slices, expected',
  [
    ('all-reduce', 1, (2 * 800 * 7 / 8, 0)),
    ('all-gather', 1, (800 * 7 / 8, 0)),
    ('all-reduce', 2, (2 * 800 * 3 / 4, 2 * 800 / 4 / 2)),
    ('collective-permute', 1, (800, 0)),
    ('collective-permute', 2, (0, 800)),
  ],
)
def test_what_a_ring_sends(kind, slices, expected):
  assert Collective(kind, 8, slices, 1, 800.0).sent == pytest.approx(expected)


def test_a_real_program_on_eight_fake_devices():
  """A loop of layers whose weights are sharded: gathered in each turn, and the gradient reduced."""
  mesh = sharding.make_mesh(1, 8, 1)
  layers, width, rows = 5, 64, 16

  def loss(w, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].sum()

  w = jax.ShapeDtypeStruct(
    (layers, width, width), np.float32, sharding=NamedSharding(mesh, PartitionSpec(None, 'fsdp'))
  )
  x = jax.ShapeDtypeStruct((rows, width), np.float32, sharding=NamedSharding(mesh, PartitionSpec('fsdp')))
  text = jax.jit(jax.grad(loss), out_shardings=w.sharding).lower(w, x).compile().as_text()
  found = collectives(text, 8)
  assert {one.group for one in found} == {8}
  gathered = sum(one.bytes for one in found if one.kind == 'all-gather')
  assert gathered >= layers * width * width * 4, 'every layer, at least once'
  assert any(one.times >= layers for one in found), 'the loop counts'
