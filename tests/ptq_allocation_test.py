"""Sensitivity of parameters, and the allocation of bits under a budget."""

import itertools

import jax.numpy as jnp
import numpy as np
import ptq_cases as cases
import pytest

from kd_jax import deploy, prune, quantize
from kd_jax import report as reports
from kd_jax.losses import logits
from kd_jax.quantize import QuantSpec, Sensitivity

pytestmark = pytest.mark.once

KERNELS = [('.*/kernel', True)]
SPECS = [QuantSpec(bits=8, axis=-1), QuantSpec(bits=4, axis=-1)]


def _network():
  model, variables, batch = cases.random_variables('cnn')
  return model, deploy.fold(model, variables, batch), batch


def test_rows_are_the_loss_of_one_change_at_a_time():
  model, variables, batch = _network()
  variables['params']['nothing'] = None
  batches = [batch, {'image': batch['image'][:1] * 2}]
  rows = quantize.sensitivity(
    cases.forward_of(model),
    variables,
    batches,
    KERNELS,
    quantize.weight_options(SPECS),
  )
  kernels = ['conv1/kernel', 'conv2/kernel', 'head/kernel']
  assert [(r.path, r.option) for r in rows] == [
    (name, spec) for name in kernels for spec in SPECS
  ]
  for path, spec, loss in rows:
    params = quantize.fake_quant_params(variables['params'], [(path, spec)])
    changed = {**variables, 'params': params}
    kl = [
      logits.kl_divergence(
        cases.run(model, changed, b),
        cases.run(model, variables, b),
        temperature=1.0,
      )
      for b in batches
    ]
    np.testing.assert_allclose(
      loss, np.concatenate(kl).mean(), rtol=1e-3, atol=1e-7
    )
  assert all(
    a.loss < b.loss for a, b in zip(rows[::2], rows[1::2], strict=True)
  )


def test_one_compilation_serves_all_parameters_and_options():
  model, variables, batch = _network()
  traces = []
  plain = cases.forward_of(model)

  def forward(variables, batch):
    traces.append(1)
    return plain(variables, batch)

  rows = quantize.sensitivity(
    forward,
    variables,
    [batch, batch],
    KERNELS,
    quantize.weight_options(SPECS),
  )
  assert len(rows) == 6
  # Once for the float network, once for the changed one.
  assert len(traces) == 2


def test_pruning_and_any_loss_can_be_measured():
  model, variables, batch = _network()

  def pruned(sparsity):
    def one(w):
      masks = prune.magnitude_masks({'w': w}, sparsity, [('w', True)])
      return prune.apply_masks({'w': w}, masks)['w']

    return one

  rows = quantize.sensitivity(
    cases.forward_of(model),
    variables,
    [batch],
    [('conv2/kernel', True)],
    {0.0: pruned(0.0), 0.5: pruned(0.5), 0.9: pruned(0.9)},
    loss=lambda output, reference: jnp.square(output - reference),
  )
  assert [r.option for r in rows] == [0.0, 0.5, 0.9]
  losses = [r.loss for r in rows]
  assert losses[0] == 0 and losses[0] < losses[1] < losses[2]
  params = dict(variables['params'])
  params['conv2'] = {
    **params['conv2'],
    'kernel': pruned(0.9)(params['conv2']['kernel']),
  }
  want = cases.run(model, variables, batch)
  got = cases.run(model, {**variables, 'params': params}, batch)
  np.testing.assert_allclose(
    losses[2], jnp.square(got - want).mean(), rtol=1e-4
  )


def test_mistakes_of_sensitivity_are_named():
  model, variables, batch = _network()
  forward = cases.forward_of(model)
  options = quantize.weight_options(SPECS)
  with pytest.raises(ValueError, match='at least one batch'):
    quantize.sensitivity(forward, variables, [], KERNELS, options)
  with pytest.raises(ValueError, match="'haed/kernel' matches nothing"):
    quantize.sensitivity(
      forward, variables, [batch], [('haed/kernel', True)], options
    )


# --- allocation


def _problem(seed, layers=5, options=3):
  rng = np.random.default_rng(seed)
  rows, costs = [], {}
  for i in range(layers):
    for o in range(options):
      path = f'layer{i}/kernel'
      rows.append(Sensitivity(path, o, float(rng.exponential())))
      costs[path, o] = int(rng.integers(1, 30))
  return rows, costs


def _every_choice(rows, costs):
  by_path = {}
  for row in rows:
    by_path.setdefault(row.path, []).append(row)
  for choice in itertools.product(*by_path.values()):
    yield (
      sum(costs[r.path, r.option] for r in choice),
      sum(r.loss for r in choice),
    )


@pytest.mark.parametrize('seed', range(5))
def test_allocation_is_the_best_of_all_and_monotone(seed):
  rows, costs = _problem(seed)
  choices = list(_every_choice(rows, costs))
  least = min(cost for cost, _ in choices)
  most = max(cost for cost, _ in choices)
  last = np.inf
  for budget in range(least, most + 3):
    got = quantize.allocate(rows, costs, budget)
    best = min(loss for cost, loss in choices if cost <= budget)
    np.testing.assert_allclose(got.loss, best)
    assert got.cost <= budget and got.loss <= last
    last = got.loss
    names = [path.replace('\\', '') for path, _ in got.rules]
    assert names == [f'layer{i}/kernel' for i in range(5)]
    spent = sum(costs[n, o] for n, (_, o) in zip(names, got.rules, strict=True))
    lost = {(r.path, r.option): r.loss for r in rows}
    assert spent == got.cost
    np.testing.assert_allclose(
      sum(lost[n, o] for n, (_, o) in zip(names, got.rules, strict=True)),
      got.loss,
    )
  with pytest.raises(
    ValueError,
    match=f'budget is {least - 1}.*smallest possible cost is {least}',
  ):
    quantize.allocate(rows, costs, least - 1)


def test_many_parameters_are_allocated_within_the_budget(monkeypatch):
  """The front is thinned: feasible, monotone, and no worse than greedy."""
  monkeypatch.setattr('kd_jax.quantize.allocation._FRONT', 200)
  rows, costs = _problem(0, layers=60)
  losses = []
  for budget in (450, 500, 600, 800, 2000):
    got = quantize.allocate(rows, costs, budget)
    assert got.cost <= budget
    losses.append(got.loss)
  assert losses == sorted(losses, reverse=True)
  exact = sum(
    min(r.loss for r in rows if r.path == f'layer{i}/kernel') for i in range(60)
  )
  np.testing.assert_allclose(losses[-1], exact)


def test_costs_that_are_missing_or_no_numbers_are_named():
  rows = [Sensitivity('a', 8, 0.1)]
  with pytest.raises(ValueError, match='no cost of a with 8'):
    quantize.allocate(rows, {}, 10)
  with pytest.raises(ValueError, match='cost nan'):
    quantize.allocate(rows, {('a', 8): float('nan')}, 10)
  with pytest.raises(ValueError, match='loss nan'):
    quantize.allocate([Sensitivity('a', 8, float('nan'))], {('a', 8): 1}, 10)


def test_bytes_of_a_parameter():
  w = jnp.zeros((3, 3, 5, 7), jnp.bfloat16)
  assert quantize.weight_bytes(w, None) == 630
  assert quantize.weight_bytes(w, QuantSpec(bits=8)) == 315 + 4
  assert quantize.weight_bytes(w, QuantSpec(bits=4, axis=-1)) == 180 + 28
  affine = QuantSpec(bits=4, axis=-1, symmetric=False)
  assert quantize.weight_bytes(w, affine) == 180 + 28 + 7


@pytest.mark.usefixtures('full_optimization')
def test_bits_are_allocated_to_a_trained_network():
  """Half way between all 4 and all 8 bits: better than 4 bits everywhere."""
  model, variables = cases.trained('cnn')
  test = cases.images(512, seed=5)
  variables = deploy.fold(model, variables, test)
  forward = cases.forward_of(model)
  rows = quantize.sensitivity(
    forward,
    variables,
    cases.calibration(2),
    KERNELS,
    quantize.weight_options(SPECS) | {None: lambda w: w},
  )
  costs = quantize.size_costs(variables['params'], rows)
  paths = {r.path for r in rows}
  small, large = (sum(costs[p, s] for p in paths) for s in SPECS[::-1])
  want = cases.run(model, variables, test)

  def measured(rules):
    params = quantize.fake_quant_params(variables['params'], rules)
    got = cases.run(model, {**variables, 'params': params}, test)
    return float(logits.kl_divergence(got, want, temperature=1.0).mean())

  chosen = quantize.allocate(rows, costs, (small + large) / 2)
  bits = {32 if spec is None else spec.bits for _, spec in chosen.rules}
  assert len(bits) > 1 and 4 in bits
  four = quantize.allocate(rows, costs, small)
  assert {spec for _, spec in four.rules} == {SPECS[1]}
  assert measured(chosen.rules) < 0.7 * measured(four.rules)
  everything = quantize.allocate(rows, costs, 1e9)
  assert everything.loss == 0 and measured(everything.rules) < 1e-6


# --- the picture


def _texts(ax):
  return [text.get_text() for text in ax.get_yticklabels()]


def test_the_figure_has_a_point_for_each_option():
  rows = [
    Sensitivity('conv1/kernel', SPECS[0], 1e-4),
    Sensitivity('conv1/kernel', SPECS[1], 1e-2),
    Sensitivity('head/kernel', SPECS[0], 0.0),
    Sensitivity('head/kernel', SPECS[1], 3e-3),
    Sensitivity('head/kernel', 0.5, float('nan')),
  ]
  [ax] = reports.sensitivity_figure(rows).axes
  assert _texts(ax) == ['conv1/kernel', 'head/kernel']
  points = {
    line.get_label(): line.get_xdata()
    for line in ax.lines
    if not line.get_label().startswith('_')
  }
  assert set(points) == {'8 bits', '4 bits'}
  np.testing.assert_allclose(points['4 bits'], [1e-2, 3e-3])
  low, high = ax.get_xlim()
  assert all(low < x < high for x in np.concatenate(list(points.values())))
  assert ax.get_xscale() == 'log'


def test_the_figure_keeps_the_most_sensitive_of_many():
  rows = [Sensitivity(f'layer{i}', 0.5, 1.0 / (i + 1)) for i in range(50)]
  [ax] = reports.sensitivity_figure(rows).axes
  assert _texts(ax) == [f'layer{i}' for i in range(40)]
  assert '40 most sensitive of 50' in ax.get_title('left')
  [ax] = reports.sensitivity_figure([]).axes
  assert [t.get_text() for t in ax.texts] == ['not measured']
