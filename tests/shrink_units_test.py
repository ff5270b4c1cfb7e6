"""Which units leave: scores against NumPy, exact counts, whole units, costs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from shrunk_models import unit_masks

from kd_jax import adapters, models, prune
from kd_jax.prune.plan import Group, Member, Plan
from kd_jax.report import measure

ONE = ((0,), (1,), (2,), (3,))
# Two groups: four channels, which a flatten of 2x1 reads twice, and two heads
# of two places; `tail` is in no group.
PLAN = Plan(
  groups=(
    Group(
      'channels',
      4,
      1,
      (
        Member('batch_stats/mean', 0, 4, ONE),
        Member('params/conv/kernel', 1, 4, ONE),
        Member('params/conv/bias', 0, 4, ONE),
        Member('params/dense/kernel', 0, 8, ((0, 4), (1, 5), (2, 6), (3, 7))),
      ),
    ),
    Group(
      'heads',
      2,
      2,
      (
        Member('params/dense/kernel', 1, 4, ((0, 1), (2, 3))),
        Member('params/out/kernel', 0, 4, ((0, 1), (2, 3))),
      ),
    ),
  ),
  frozen={},
  shapes={
    'batch_stats/mean': (4,),
    'params/conv/kernel': (3, 4),
    'params/conv/bias': (4,),
    'params/dense/kernel': (8, 4),
    'params/out/kernel': (4, 3),
    'params/tail/kernel': (3, 3),
  },
)


def _params(seed=0):
  rng = np.random.default_rng(seed)
  return {
    path.removeprefix('params/'): rng.normal(size=shape).astype('f')
    for path, shape in PLAN.shapes.items()
    if path.startswith('params/')
  }


def _scores(seed=0):
  return {k: np.abs(v) for k, v in _params(seed).items()}


def _numpy_scores(scores, pool, norm):
  """The formula, unit by unit: mean over parameters of pooled entries."""
  found = {}
  for group in PLAN.groups:
    values = []
    for unit in range(group.size):
      parts = []
      for m in group.members:
        if not m.path.startswith('params/'):
          continue
        score = scores.get(m.path.removeprefix('params/'))
        if score is None:
          parts.append(0.0)
          continue
        entries = np.take(score, m.positions[unit], axis=m.axis)
        others = tuple(i for i in range(score.ndim) if i != m.axis)
        by_position = getattr(np, pool)(entries, axis=others)
        parts.append(getattr(np, pool)(by_position))
      values.append(np.mean(parts))
    sizes = np.abs(values)
    by = {'mean': np.mean(sizes), 'max': np.max(sizes), 'none': 1.0}[norm]
    found[group.name] = np.array(values) / by
  return found


@pytest.mark.parametrize('pool', ['sum', 'mean'])
@pytest.mark.parametrize('norm', ['mean', 'max', 'none'])
@pytest.mark.parametrize('signed', [False, True])
def test_unit_scores_are_the_formula(pool, norm, signed):
  # Those of movement are signed: their sum may be next to nothing.
  scores = _params(0) if signed else _scores()
  del scores['conv/bias']
  found = prune.unit_scores(PLAN, scores, pool=pool, norm=norm)
  for name, want in _numpy_scores(scores, pool, norm).items():
    np.testing.assert_allclose(found[name], want, rtol=1e-5, atol=1e-6)


def test_scores_of_zeros_and_of_low_precision():
  zeros = {k: jnp.zeros_like(v) for k, v in _scores().items()}
  for name, score in prune.unit_scores(PLAN, zeros).items():
    np.testing.assert_array_equal(score, 0.0, err_msg=name)
  low = {k: jnp.asarray(v, jnp.bfloat16) for k, v in _scores().items()}
  found = prune.unit_scores(PLAN, low)
  assert {s.dtype for s in found.values()} == {jnp.dtype('float32')}
  # Summed in float32, not in bfloat16.
  exact = {k: np.asarray(v, np.float32) for k, v in low.items()}
  for name, want in _numpy_scores(exact, 'sum', 'mean').items():
    np.testing.assert_allclose(found[name], want, rtol=1e-5)


def test_bad_words_and_shapes_are_named():
  with pytest.raises(ValueError, match="Unknown pool 'max'.*mean"):
    prune.unit_scores(PLAN, {}, pool='max')
  with pytest.raises(ValueError, match="Unknown norm 'l2'"):
    prune.unit_scores(PLAN, {}, norm='l2')
  with pytest.raises(ValueError, match="'conv/bias' have shape"):
    prune.unit_scores(PLAN, {'conv/bias': np.ones(5)})
  with pytest.raises(ValueError, match="scope 'globl'"):
    prune.neurons(PLAN)(_scores(), 0.5, 'globl')
  with pytest.raises(ValueError, match=r'in \[0, 1\)'):
    prune.choose_units(PLAN, _scores(), 1.0)
  with pytest.raises(ValueError, match='multiple_of=0'):
    prune.choose_units(PLAN, _scores(), 0.5, multiple_of=0)


def _kept_units(masks):
  kept = prune.kept_from_masks(PLAN, masks)
  return {name: units.tolist() for name, units in kept.items()}


@pytest.mark.parametrize('scope', ['global', 'layer'])
def test_whole_units_are_masked_in_exact_numbers(scope):
  structure = jax.jit(
    lambda s, sparsity: prune.neurons(PLAN)(s, sparsity, scope)
  )
  for seed in range(3):
    scores = _scores(seed)
    ranked = _numpy_scores(scores, 'sum', 'mean')
    for sparsity in (0.0, 0.2, 1 / 3, 0.5, 0.7, 0.9, 0.999):
      masks = structure(scores, sparsity)
      kept = _kept_units(masks)
      assert all(kept.values())
      sizes = {g.name: g.size for g in PLAN.groups}
      if scope == 'layer':
        for name, size in sizes.items():
          assert len(kept[name]) == max(1, size - round(sparsity * size))
      else:
        count = max(2, 6 - round(sparsity * 6))
        assert sum(map(len, kept.values())) == count
      for name, units in kept.items():
        best = np.argsort(-ranked[name], kind='stable')[: len(units)]
        assert units == sorted(best.tolist())
      # The masks are those of the units and nothing else.
      for name, mask in unit_masks(PLAN, kept).items():
        np.testing.assert_array_equal(masks[name], mask, err_msg=name)
      assert masks['tail/kernel'].all()


def test_global_ranks_the_groups_against_each_other():
  scores = _scores()
  scores['out/kernel'] *= 0
  scores['dense/kernel'] *= 0
  # Both heads score 0, so that channels go only after a head has gone.
  kept = prune.choose_units(PLAN, scores, 0.2)
  assert {k: len(v) for k, v in kept.items()} == {'channels': 4, 'heads': 1}
  assert kept['heads'].tolist() == [0]


def test_choosing_once_is_choosing_in_the_step():
  structure = jax.jit(prune.neurons(PLAN), static_argnums=2)
  for scope in ('global', 'layer'):
    for seed, sparsity in enumerate((0.0, 0.2, 0.4, 0.6, 0.8, 0.95)):
      scores = _scores(seed)
      if scope == 'layer':  # with equal scores
        scores = {k: np.round(v) for k, v in scores.items()}
      masks = structure(scores, sparsity, scope)
      chosen = prune.choose_units(PLAN, scores, sparsity, scope=scope)
      found = {name: units.tolist() for name, units in chosen.items()}
      assert found == _kept_units(masks)


def test_of_equal_units_the_first_stay():
  member = Member('params/w', 0, 64, tuple((i,) for i in range(64)))
  plan = Plan((Group('w', 64, 1, (member,)),), {}, {'params/w': (64,)})
  scores = {'w': np.repeat(np.float32([1, 2]), 32)}
  kept = prune.choose_units(plan, scores, 0.25)['w']
  assert kept.tolist() == [*range(16), *range(32, 64)]


def test_multiples_are_of_channels_and_never_beyond_the_group():
  ranked = _numpy_scores(_scores(), 'sum', 'mean')['channels']
  kept = prune.choose_units(PLAN, _scores(), 0.75, scope='layer', multiple_of=2)
  # One head has two channels already; one channel becomes two, the best two.
  assert kept['heads'].size == 1
  assert kept['channels'].tolist() == sorted(np.argsort(-ranked)[:2].tolist())
  kept = prune.choose_units(PLAN, _scores(), 0.75, multiple_of=16)
  assert [len(v) for v in kept.values()] == [4, 2]


def test_partial_masks_keep_what_has_anything_left():
  masks = {
    'conv/kernel': np.zeros((3, 4), bool),
    'tail/kernel': np.zeros((3, 3)),
  }
  masks['conv/kernel'][1, [0, 2]] = True
  assert _kept_units(masks) == {'channels': [0, 2], 'heads': [0, 1]}
  masks['dense/kernel'] = np.zeros((8, 4), bool)
  masks['dense/kernel'][7, 0] = True
  assert _kept_units(masks) == {'channels': [0, 2, 3], 'heads': [0]}
  nothing = {k: np.zeros_like(v, bool) for k, v in _scores().items()}
  assert _kept_units(nothing) == {'channels': [0], 'heads': [0]}


@pytest.mark.parametrize('score', [prune.magnitude(), prune.taylor()])
def test_training_prunes_whole_units_in_exact_numbers(score):
  tx = prune.prune(
    optax.adam(0.1),
    prune.linear(0.6, begin=0, end=4),
    [('.*', True)],
    score=score,
    structure=prune.neurons(PLAN),
  )
  params = {k: jnp.asarray(v) for k, v in _params().items()}
  state = tx.init(params)
  before = {'channels': set(range(4)), 'heads': set(range(2))}
  rng = np.random.default_rng(3)
  for step in range(7):
    grads = {k: rng.normal(size=v.shape).astype('f') for k, v in params.items()}
    updates, state = jax.jit(tx.update)(grads, state, params)
    params = optax.apply_updates(params, updates)
    kept = _kept_units(state.masks)
    share = 0.6 * min(step / 4, 1)
    assert sum(map(len, kept.values())) == 6 - round(6 * share)
    # A unit that has left stays out, and so do all its entries.
    assert all(set(kept[name]) <= units for name, units in before.items())
    before = {name: set(units) for name, units in kept.items()}
    for name, mask in unit_masks(PLAN, kept).items():
      np.testing.assert_array_equal(params[name] != 0, mask, err_msg=name)


def test_structures_work_in_vmap_scan_and_grad():
  structure = jax.jit(prune.neurons(PLAN), static_argnums=2)
  stack = jax.tree.map(lambda *x: jnp.stack(x), *map(_scores, range(3)))
  mapped = jax.vmap(lambda s: structure(s, 0.5, 'global'))(stack)
  _, scanned = jax.lax.scan(
    lambda c, s: (c, structure(s, 0.5, 'global')), 0, stack
  )
  for seed in range(3):
    alone = structure(_scores(seed), 0.5, 'global')
    for name, mask in alone.items():
      np.testing.assert_array_equal(mapped[name][seed], mask)
      np.testing.assert_array_equal(scanned[name][seed], mask)

  def loss(params):
    scores = {k: jnp.abs(v) for k, v in params.items()}
    masks = structure(scores, 0.5, 'global')
    return sum((v * masks[k]).sum() for k, v in params.items())

  grads = jax.grad(loss)(_params())
  masks = structure(_scores(), 0.5, 'global')
  for name, grad in grads.items():
    np.testing.assert_array_equal(grad, masks[name])


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
def test_sharded_scores_get_the_same_masks_sharded_alike(kind):
  mesh = jax.make_mesh((2,), ('data',), axis_types=(kind,))
  split = {
    'conv/kernel': PartitionSpec(None, 'data'),
    'dense/kernel': PartitionSpec('data', None),
    'out/kernel': PartitionSpec('data'),
  }
  scores = _scores()
  with jax.set_mesh(mesh):
    placed = {
      k: jax.device_put(v, NamedSharding(mesh, split.get(k, PartitionSpec())))
      for k, v in scores.items()
    }
    shardings = {k: v.sharding for k, v in placed.items()}
    run = jax.jit(
      lambda s: prune.neurons(PLAN)(s, 0.5, 'global'), out_shardings=shardings
    )
    masks = run(placed)
  alone = prune.neurons(PLAN)(scores, 0.5, 'global')
  for name, mask in masks.items():
    np.testing.assert_array_equal(mask, alone[name])
    assert mask.sharding.is_equivalent_to(shardings[name], mask.ndim)


# --- removing


def test_everything_that_mirrors_the_parameters_shrinks():
  params = {
    'conv': {'kernel': jnp.ones((3, 4), jnp.bfloat16), 'bias': jnp.arange(4.0)},
    'dense': {'kernel': jnp.arange(32.0).reshape(8, 4), 'bias': None},
    'out': {'kernel': jnp.ones((4, 3))},
    'tail': {'kernel': jnp.ones((3, 3))},
  }
  tx = prune.prune(
    optax.chain(optax.clip(1.0), optax.adam(0.1)),
    prune.constant(0.5),
    [('.*/kernel', True)],
  )
  kept = {'channels': np.array([1, 3]), 'heads': np.array([0])}
  small = prune.shrink(PLAN, params, kept)
  assert small['dense']['bias'] is None
  assert small['conv']['kernel'].dtype == jnp.bfloat16
  assert small['conv']['bias'].tolist() == [1, 3]
  np.testing.assert_array_equal(
    small['dense']['kernel'],
    np.arange(32.0).reshape(8, 4)[[1, 3, 5, 7]][:, [0, 1]],
  )
  state = prune.shrink(PLAN, tx.init(params), kept)
  fresh = tx.init(small)
  assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, fresh)
  masks = prune.shrink(PLAN, {'conv/kernel': np.eye(3, 4) > 0}, kept)
  assert masks['conv/kernel'].tolist() == [[0, 0], [1, 0], [0, 0]]
  abstract = jax.eval_shape(lambda p: p, params)
  assert prune.shrink(PLAN, abstract, kept) == jax.eval_shape(
    lambda p: p, small
  )
  # Nothing is named, nothing leaves.
  assert jax.tree.all(
    jax.tree.map(lambda a, b: a is b, params, prune.shrink(PLAN, params, {}))
  )


def test_a_momentum_mirrors_the_parameter_and_not_state_of_its_name():
  shapes = PLAN.shapes | {'seen/conv/kernel': (2,)}
  plan = Plan(PLAN.groups, {}, shapes)
  state = {'mu': {'conv': {'kernel': np.zeros((3, 4))}}}
  small = prune.shrink(plan, state, {'channels': np.array([1, 3])})
  assert small['mu']['conv']['kernel'].shape == (3, 2)


def test_shrinking_keeps_shardings_that_still_fit_and_can_be_traced():
  mesh = jax.make_mesh((2,), ('data',), axis_types=(AxisType.Auto,))
  split = NamedSharding(mesh, PartitionSpec(None, 'data'))
  params = {'conv': {'kernel': jax.device_put(np.ones((3, 4), 'f'), split)}}
  small = prune.shrink(PLAN, params, {'channels': [0, 3]})
  assert small['conv']['kernel'].sharding.is_equivalent_to(split, 2)
  odd = prune.shrink(PLAN, params, {'channels': [0, 2, 3]})
  assert odd['conv']['kernel'].sharding.is_fully_replicated
  traced = jax.jit(lambda p: prune.shrink(PLAN, p, {'channels': [0, 3]}))
  assert traced(params)['conv']['kernel'].shape == (3, 2)


def test_wrong_units_and_shapes_are_named():
  params = {'conv': {'kernel': np.ones((3, 4))}}
  with pytest.raises(ValueError, match="group of units 'chanels': did you"):
    prune.shrink(PLAN, params, {'chanels': [0]})
  with pytest.raises(ValueError, match="'channels' has units 0 to 3, not 2 to"):
    prune.shrink(PLAN, params, {'channels': [2, 4]})
  with pytest.raises(ValueError, match="'heads': at least one unit"):
    prune.shrink(PLAN, params, {'heads': []})
  factored = {'v_row': {'conv': {'kernel': np.ones(3)}}}
  with pytest.raises(ValueError, match="'v_row/conv/kernel' has shape"):
    prune.shrink(PLAN, factored, {'channels': [0]})
  # Shrunk twice.
  kept = {'channels': [0, 1]}
  with pytest.raises(ValueError, match=r'has shape \(3, 2\)'):
    prune.shrink(PLAN, prune.shrink(PLAN, params, kept), kept)


# --- costs


class Scanned(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Dense(6, name='first')(x)
    block = nn.scan(
      Step, variable_axes={'params': 0}, split_rngs={'params': True}, length=4
    )
    x, _ = block(name='steps')(x, None)
    return nn.Dense(3, name='head')(x)


class Step(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return nn.Dense(6, name='dense')(x), None


def _costs(model, x, **options):
  forward = adapters.from_linen(model, **options)
  batch = {'image': x}
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x))
  rows = prune.layer_costs(forward, shapes, batch)
  one = {'image': jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)}
  total = measure.multiply_accumulates(
    lambda v, b: forward(v, b).output, shapes, one
  )
  assert sum(r.macs for r in rows) == total
  leaves = jax.tree.leaves(shapes['params'])
  assert sum(r.parameters for r in rows) == sum(v.size for v in leaves)
  return {r.path.removeprefix('params/'): r for r in rows}


def test_costs_of_convolutions_are_counted_by_hand():
  rows = _costs(models.CNN(3, widths=(4, 6)), np.zeros((5, 8, 8, 1), 'f'))
  assert rows['conv1/kernel'].macs == 64 * 4 * 9
  assert rows['conv2/kernel'].macs == 16 * 6 * 9 * 4
  assert rows['head/kernel'].macs == 6 * 3
  assert rows['norm1/scale'] == ('params/norm1/scale', 0, 4, 16)
  assert rows['conv2/kernel'].bytes == 4 * rows['conv2/kernel'].parameters


def test_steps_of_a_scan_multiply():
  rows = _costs(Scanned(), np.zeros((2, 5), 'f'), train_argument=None)
  assert rows['steps/dense/kernel'].macs == 4 * 36
  assert rows['first/kernel'].macs == 30


def test_attention_multiplies_activations():
  model = models.ViT(3, patch_size=4, width=12, depth=2, heads=3)
  rows = _costs(model, np.zeros((3, 8, 8, 3), 'f'))
  # 5 tokens: scores and context, twice 5 * 5 * 12 in each block.
  assert rows['(activations)'].macs == 2 * 2 * 5 * 5 * 12
  assert rows['block1/mlp/dense1/kernel'].macs == 5 * 12 * 48


def _own_jvp(f):
  f = jax.custom_jvp(f)
  f.defjvp(lambda primals, tangents: (f(*primals), f(*tangents)))
  return f


@pytest.mark.parametrize('wrap', [jax.checkpoint, _own_jvp])
def test_kernels_count_for_themselves_however_they_are_prepared(wrap):
  def apply(params, x):
    scaled = jnp.round(params['w'] / 0.1) * 0.1 * params['g'][None]
    return wrap(lambda x, w: jax.nn.relu(x @ w))(x, scaled)

  forward = adapters.from_apply(apply)
  variables = {'params': {'w': np.ones((5, 8), 'f'), 'g': np.ones(8, 'f')}}
  rows = prune.layer_costs(forward, variables, {'image': np.ones((3, 5), 'f')})
  assert {r.path: r.macs for r in rows} == {'params/w': 40, 'params/g': 0}


def test_a_loop_counts_once_and_each_branch_of_a_choice():
  """How often a loop goes round is not known before it runs."""

  def apply(params, x):
    _, x = jax.lax.while_loop(
      lambda carry: carry[0] < params['rounds'],
      lambda carry: (carry[0] + 1, carry[1] @ params['w']),
      (0, x),
    )
    return jax.lax.cond(
      jnp.sum(x) > 0, lambda x: x @ params['v'], lambda x: -x @ params['v'], x
    )

  variables = {'params': {'w': np.ones((5, 5), 'f'), 'v': np.ones((5, 2), 'f')}}
  variables['params']['rounds'] = np.int32(3)
  forward = adapters.from_apply(apply)
  rows = prune.layer_costs(forward, variables, {'image': np.ones((3, 5), 'f')})
  macs = {r.path: r.macs for r in rows}
  assert macs == {'params/w': 25, 'params/v': 2 * 10, 'params/rounds': 0}


def test_arrays_of_two_batches_have_no_cost_per_example():
  forward = adapters.from_apply(lambda params, x: x @ params['w'])
  batch = {'image': np.ones((3, 5), 'f'), 'label': np.zeros(2, 'i4')}
  with pytest.raises(ValueError, match=r'layer_costs: .*\[2, 3\] examples'):
    prune.layer_costs(forward, {'params': {'w': np.ones((5, 8), 'f')}}, batch)
