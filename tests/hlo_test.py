"""The parser of compiled programs, on lines as XLA writes them."""

import pytest

from kd_jax.plan import hlo

REDUCE = (
  '  %all-reduce.57 = (f32[]{:T(128)}, f32[100]{0:T(128)S(1)}, '
  'f32[3,3,4,8]{3,2,1,0:T(4,128)}) all-reduce(%a, %b, %c), channel_id=2, '
  "replica_groups=mesh['axis_0'=4] {'axis_0'}, use_global_device_ids=true, "
  'to_apply=%add, metadata={op_name="jit(f)/jvp()/reduce_sum"}'
)
GATHER = (
  '%ag = (f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%p), '
  'replica_groups=[2,4]<=[8], dimensions={0}, metadata={op_name='
  '"jit(f)/jvp(student)/dense/dot_general"}'
)
SCATTER = (
  'ROOT %rs = bf16[2,8]{1,0} reduce-scatter(%g), replica_groups={{0,1,2,3}}, '
  'metadata={op_name="jit(f)/transpose(jvp(student))/dense/dot_general"}'
)
PERMUTE = '%cp = s32[16]{0} collective-permute(%x), source_target_pairs={{0,1}}'
TEACHER = (
  '%ar = f32[64]{0} all-reduce-start(%x), replica_groups={}, '
  'metadata={op_name="jit(f)/teacher/dense/add"}'
)


@pytest.mark.parametrize(
  'line, kind, bytes_, group, sent',
  [
    (REDUCE, 'all-reduce', 4 + 400 + 4 * 288, 4, 1.5 * (404 + 1152)),
    (GATHER, 'all-gather', 256, 4, 192),
    (SCATTER, 'reduce-scatter', 128, 4, 96),
    (PERMUTE, 'collective-permute', 64, 0, 64),
    (TEACHER, 'all-reduce', 256, 0, 2 * 256 * 7 / 8),
  ],
)
def test_kind_bytes_and_group(line, kind, bytes_, group, sent):
  [found] = hlo.collectives(line)
  assert (found.kind, found.bytes, found.group) == (kind, bytes_, group)
  assert found.sent(8) == sent


def test_what_is_no_collective_is_left_out():
  lines = (
    '%x = f32[4]{0} add(%all-reduce.1, %all-gather.2)',
    '%d = f32[8,8]{1,0} all-gather-done(%ag)',
    '%all-reduce.7.fusion = f32[4]{0} fusion(%all-reduce.7), kind=kLoop',
  )
  assert hlo.collectives('\n'.join(lines)) == []


def test_owners():
  found = hlo.collectives('\n'.join((REDUCE, GATHER, SCATTER, TEACHER)))
  sizes = [(100, 100), (288, 288), (16, 64)]
  owned = {c.kind + c.scope[:12]: s for c, s in hlo.owned(found, sizes)}
  assert owned == {
    'all-reducejit(f)/jvp()': {'metrics': 4, 'gradients': 400 + 1152},
    'all-gatherjit(f)/jvp(s': {'parameters': 256},
    'reduce-scatterjit(f)/trans': {'gradients': 128},
    'all-reducejit(f)/teach': {'teacher': 256},
  }


def test_a_parameter_has_one_gradient():
  """BatchNorm's sums have the shapes of gradients, and come more often."""
  backward = (
    '%a = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, '
    'metadata={op_name="jit(f)/transpose(jvp(student))/norm/reduce_sum"}'
  )
  forward = backward.replace('transpose(jvp(student))', 'jvp(student)')
  found = hlo.collectives('\n'.join((forward, backward, backward)))
  owners = [shares for _, shares in hlo.owned(found, [(8, 8)])]
  assert owners == [{'statistics': 32}, {'gradients': 32}, {'statistics': 32}]


def test_the_teacher_is_a_scope_and_no_part_of_a_word():
  line = TEACHER.replace('/teacher/', '/student/teachers_pet/')
  [(_, shares)] = hlo.owned(hlo.collectives(line), [])
  assert shares == {'statistics': 256}
