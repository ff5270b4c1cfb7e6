"""Reference values made with other implementations, case by case.

They are read from tests/data/oracles, or from the directory that the
environment variable KD_JAX_ORACLES names: the same cases, perhaps with other
seeds and shapes. Hyper-parameters come from the files as well.
"""

import json
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from kd_jax import adapters, losses, prune, quantize

DIRECTORY = pathlib.Path(
  os.environ.get('KD_JAX_ORACLES')
  or pathlib.Path(__file__).parent / 'data' / 'oracles'
)


def _with_margin(student, teacher, *, margin):
  return losses.overhaul(student, teacher, jnp.full(teacher.shape[-1], margin))


def _relational(student, teacher, *, distance_weight, angle_weight):
  distance = losses.relational_distance(student, teacher)
  angle = losses.relational_angle(student, teacher)
  return distance_weight * distance + angle_weight * angle


def _vid(student, teacher, *, init_variance):
  variance = jnp.full(teacher.shape[-1], init_variance)
  return losses.variational_information(student, teacher, variance)


def _flow(student1, teacher1, student2, teacher2):
  student, teacher = (student1, student2), (teacher1, teacher2)
  return losses.flow_of_solution(student, teacher)


def _activation_boundary(student, teacher, *, margin):
  loss = losses.activation_boundary(student, teacher, margin=margin)
  return 3 * loss / 1000


def _nce(scores, *, n_data):
  return losses.contrastive_nce(scores, num_data=n_data)


def _patient(student, teacher):
  return losses.patient_kd(student[:, 0], teacher[:, 0])


# Every case of the losses, as whole names: what computes it, and what the case
# uses besides its inputs.
LOSSES = {
  r'kd_T[\d.]+': (losses.kl_divergence, ()),
  r'logit_mse': (losses.squared_error, ()),
  r'dkd_.*': (losses.decoupled_kd, ('labels',)),
  r'nkd_.*': (losses.normalized_kd, ('labels',)),
  r'dist_.*': (losses.dist, ()),
  r'kd_logit_standardized_.*': (losses.standardized_kl_divergence, ()),
  r'gkd_jsd_.*': (losses.jensen_shannon, ()),
  r'rkd_.*': (_relational, ()),
  r'sp': (losses.similarity_preserving, ()),
  r'pkt': (losses.probabilistic_transfer, ()),
  r'cc': (losses.correlation_congruence, ()),
  r'attention_transfer_.*': (losses.attention_transfer, ()),
  r'nst.*': (losses.neuron_selectivity, ()),
  r'factor_transfer_.*': (losses.factor_transfer, ()),
  r'fitnet_hint': (losses.hint, ()),
  r'fsp': (_flow, ()),
  r'activation_boundary_.*': (_activation_boundary, ()),
  r'ofd_.*': (_with_margin, ()),
  r'reviewkd_hcl': (losses.hierarchical_context, ()),
  r'vid_.*': (_vid, ()),
  r'hidden_mse_masked': (losses.hidden_squared_error, ('mask',)),
  r'hidden_cosine_masked': (losses.hidden_cosine, ('mask',)),
  r'attention_mse_masked': (losses.attention_squared_error, ('mask',)),
  r'attention_ce_masked': (losses.attention_cross_entropy, ('mask',)),
  r'patient_kd_cls': (_patient, ()),
  r'crd_nce_.*': (_nce, ()),
}
# Sums over the positions of a sequence, divided by the batch alone.
SUMMED = r'gkd_jsd_.*'
FAKE_QUANT = r'weight_sym_.*|activation_asym_.*'
LEARNED = r'lsq_.*'
MASKS = r'magnitude_(global|layer)_.*'
CHANNELS = r'channel_l[12]_.*'
N_M = r'n_m_.*'
COMPRESSED = (FAKE_QUANT, LEARNED, MASKS, CHANNELS, N_M)
OTHERS = ('int8_matmul', 'cubic_schedule')
# Known cases: one that vanishes from the files must not pass in silence.
REQUIRED = {
  'kd_losses': (
    *('kd_T1', 'kd_T4', 'kd_T20', 'logit_mse'),
    *('dkd_a1_b8_T4', 'dkd_a1_b2_T4', 'dkd_a0.5_b0.5_T1'),
    *('dist_b1_g1_tau1', 'dist_b2_g0.5_tau1', 'dist_b1_g1_tau4'),
    *('kd_logit_standardized_T2', 'kd_logit_standardized_T4'),
    *('nkd_T1_g1.5', 'nkd_T2_g1', 'rkd_d25_a50', 'rkd_d1_a0'),
    *(f'gkd_jsd_b{b}_T1' for b in ('0', '0.1', '0.5', '0.9', '1')),
    *('sp', 'pkt', 'cc', 'fitnet_hint', 'fsp', 'reviewkd_hcl'),
    *('attention_transfer_p2', 'attention_transfer_p2_pooled'),
    *('nst', 'nst_pooled'),
    *('factor_transfer_p2_1', 'factor_transfer_p2_1_pooled'),
    *('activation_boundary_m1', 'ofd_margin_-0.5', 'vid_identity_regressor'),
    *('hidden_mse_masked', 'hidden_cosine_masked'),
    *('attention_mse_masked', 'attention_ce_masked'),
    *('patient_kd_cls', 'crd_nce_n1000'),
  ),
  'compression': (
    'weight_sym_tensor_int8_narrow',
    'weight_sym_tensor_int8',
    'weight_sym_channel_int8_narrow',
    'weight_sym_tensor_int4_narrow',
    'weight_sym_tensor_int4',
    'weight_sym_channel_int4_narrow',
    'activation_asym_tensor_int8_clipped',
    'activation_asym_tensor_int4_clipped',
    'lsq_tensor_int8',
    'lsq_tensor_int4',
    'int8_matmul',
    'magnitude_global_0.5',
    'magnitude_global_0.9',
    'magnitude_layer_0.5',
    'magnitude_layer_0.9',
    *(f'channel_l{p}_{s}' for p in (1, 2) for s in (0.5, 0.9)),
    'n_m_2_4',
    'cubic_schedule',
  ),
}


def _read(name):
  cases = json.loads((DIRECTORY / f'{name}.json').read_text())
  return cases, np.load(DIRECTORY / f'{name}.npz')


LOSS_CASES, LOSS_ARRAYS = _read('kd_losses')
COMPRESSION_CASES, ARRAYS = _read('compression')


def _matching(pattern, cases):
  return [name for name in cases if re.fullmatch(pattern, name)]


def _close(got, want, tolerance):
  """To a tolerance relative to the largest value, as gradients cancel."""
  want = np.asarray(want)
  np.testing.assert_allclose(
    got, want, rtol=tolerance, atol=tolerance * np.abs(want).max()
  )


def test_every_implemented_case_is_in_the_files_and_checked():
  checked = {
    'kd_losses': {n for p in LOSSES for n in _matching(p, LOSS_CASES)},
    'compression': {
      *_matching('|'.join(COMPRESSED), COMPRESSION_CASES),
      *(name for name in OTHERS if name in COMPRESSION_CASES),
    },
  }
  for name, required in REQUIRED.items():
    missing = set(required) - checked[name]
    assert not missing, f'{DIRECTORY / name}.json lacks {sorted(missing)}'


@pytest.mark.parametrize('name', LOSS_CASES)
def test_loss(name):
  case = LOSS_CASES[name]
  [(loss, extras)] = [v for p, v in LOSSES.items() if re.fullmatch(p, name)]
  student, *others = [
    jnp.asarray(LOSS_ARRAYS[f'input/{key}'], jnp.float32)
    for key in case['inputs']
  ]
  others += [jnp.asarray(LOSS_ARRAYS[f'input/{key}']) for key in extras]
  assert case['grad_wrt'] == case['inputs'][0]

  def mean(student):
    values = loss(student, *others, **case['hyperparameters'])
    if re.fullmatch(SUMMED, name):
      return jnp.sum(values) / len(values)
    return jnp.mean(values)

  value, gradient = jax.jit(jax.value_and_grad(mean))(student)
  np.testing.assert_allclose(value, LOSS_ARRAYS[f'{name}/value'], rtol=1e-5)
  _close(gradient, LOSS_ARRAYS[f'{name}/grad'], 1e-4)


def _spec(case):
  """The QuantSpec of a case, checked against the case's own codes."""
  qmin, qmax = case['qmin'], case['qmax']
  spec = quantize.QuantSpec(
    bits=case['bits'],
    symmetric='range' not in case,
    narrow=qmin == -qmax,
    axis=-1 if case['granularity'].startswith('channel') else None,
  )
  assert (spec.qmin, spec.qmax) == (qmin, qmax)
  return spec


def _case_scale(case, x, spec):
  """The scale by the case's own words, in NumPy and float32."""
  if 'range' in case:
    return np.float32(case['scale']), np.float32(case['zero_point'])
  axes = tuple(range(x.ndim if spec.axis is None else x.ndim - 1))
  scale = np.abs(x).max(axis=axes, keepdims=True) / np.float32(spec.qmax)
  return scale.astype(np.float32), np.float32(0)


@pytest.mark.parametrize('name', _matching(FAKE_QUANT, COMPRESSION_CASES))
def test_fake_quant(name):
  case = COMPRESSION_CASES[name]
  spec = _spec(case)
  x = ARRAYS[f'input/{case["input"]}']
  if 'range' in case:
    scale, zero_point = quantize.scale_and_zero_point(*case['range'], spec)

    def apply(x):
      return quantize.fake_quant(x, scale, zero_point, spec.qmin, spec.qmax)
  else:

    def apply(x):
      return quantize.fake_quant_params({'w': x}, [('w', spec)])['w']

  value, vjp = jax.vjp(apply, jnp.asarray(x))
  [gradient] = vjp(jnp.asarray(ARRAYS[f'input/{case["cotangent"]}']))
  want = ARRAYS[f'{name}/value']
  _close(value, want, 1e-5)
  _close(gradient, ARRAYS[f'{name}/grad'], 1e-4)
  scale, zero_point = _case_scale(case, x, spec)
  codes = quantize.quantize(jnp.asarray(x), scale, zero_point, spec)
  np.testing.assert_array_equal(codes, np.rint(want / scale) + zero_point)


@pytest.mark.parametrize(
  'name', _matching('activation_asym_.*', COMPRESSION_CASES)
)
def test_affine_scale_and_zero_point(name):
  case = COMPRESSION_CASES[name]
  got = quantize.scale_and_zero_point(*case['range'], _spec(case))
  np.testing.assert_allclose(got[0], case['scale'], rtol=1e-6)
  assert int(got[1]) == case['zero_point']


@pytest.mark.parametrize('name', _matching(LEARNED, COMPRESSION_CASES))
def test_learned_step_size(name):
  case = COMPRESSION_CASES[name]
  x = jnp.asarray(ARRAYS[f'input/{case["input"]}'])
  first, last, factor = (case[k] for k in ('qmin', 'qmax', 'grad_factor'))
  value, vjp = jax.vjp(
    lambda x, step: quantize.lsq(x, step, first, last, factor),
    x,
    jnp.float32(case['scale']),
  )
  cotangent = jnp.asarray(ARRAYS[f'input/{case["cotangent"]}'])
  to_x, to_step = vjp(cotangent)
  _close(value, ARRAYS[f'{name}/value'], 1e-5)
  _close(to_x, ARRAYS[f'{name}/grad'], 1e-4)
  _close(to_step, ARRAYS[f'{name}/scale_grad'], 1e-4)
  # The factor is the paper's, with the number of values for N.
  want = quantize.lsq_gradient_factor(x.size, last)
  np.testing.assert_allclose(factor, want, rtol=1e-6)


def test_int8_matmul():
  case = COMPRESSION_CASES['int8_matmul']
  codes, kernel = (jnp.asarray(ARRAYS[f'input/{k}']) for k in case['input'])
  # The library's integer Dense layer with all scales 1 is the bare product.
  size = kernel.shape[-1]
  layer = {
    'kernel': kernel,
    'kernel_scale': jnp.ones(size),
    'bias': jnp.zeros(size, jnp.int32),
    'input0': {'scale': jnp.float32(1), 'zero_point': jnp.int8(0)},
  }
  forward = adapters.from_linen(
    nn.Dense(size, use_bias=False),
    interceptors=(quantize.execute_integers(),),
    train_argument=None,
  )
  product = forward({'int8': layer}, {'image': codes.astype(jnp.float32)})
  want = ARRAYS['int8_matmul/value']
  np.testing.assert_array_equal(product.output, want.astype(np.float32))


def _masks(name):
  """The masks of a case, and the parameters they are of, by name."""
  masks = {
    key.split('/')[1]: ARRAYS[key]
    for key in ARRAYS.files
    if re.fullmatch(re.escape(name) + '/.*/mask', key)
  }
  assert masks
  return masks, {key: ARRAYS[f'input/{key}'] for key in sorted(masks)}


@pytest.mark.parametrize('name', _matching(MASKS, COMPRESSION_CASES))
def test_magnitude_masks(name):
  case = COMPRESSION_CASES[name]
  masks, params = _masks(name)
  got = prune.magnitude_masks(
    params, case['sparsity'], [('.*', True)], scope=case['scope']
  )
  assert set(got) == set(masks)
  for key, mask in masks.items():
    np.testing.assert_array_equal(got[key], mask)


def _structured_masks(name, structure, sparsity):
  _, params = _masks(name)
  scores = prune.magnitude().value((), params)
  return prune.masks_from(scores, sparsity, scope='layer', structure=structure)


@pytest.mark.parametrize('name', _matching(CHANNELS, COMPRESSION_CASES))
def test_channel_masks(name):
  case = COMPRESSION_CASES[name]
  pool = 'l1' if 'L1' in case['scope'] else 'l2'
  structure = prune.channels(-1, pool=pool)
  got = _structured_masks(name, structure, case['sparsity'])
  for key, mask in _masks(name)[0].items():
    np.testing.assert_array_equal(
      got[key], np.broadcast_to(mask, got[key].shape)
    )


@pytest.mark.parametrize('name', _matching(N_M, COMPRESSION_CASES))
def test_n_m_masks(name):
  case = COMPRESSION_CASES[name]
  n, m = case['n'], case['m']
  axis = int(re.search(r'\((-?\d+)\)', case['axis'])[1])
  got = _structured_masks(name, prune.n_m(n, m, axis), 1 - n / m)
  for key, mask in _masks(name)[0].items():
    np.testing.assert_array_equal(got[key], mask)


def test_cubic_schedule():
  case = COMPRESSION_CASES['cubic_schedule']
  schedule = prune.cubic(
    case['final'],
    initial=case['initial'],
    begin=case['begin_step'],
    end=case['end_step'],
    power=case['power'],
  )
  steps = ARRAYS['input/schedule_steps']
  np.testing.assert_allclose(
    jax.vmap(schedule)(steps.astype(np.int32)),
    ARRAYS['cubic_schedule/value'],
    rtol=1e-5,
    atol=1e-5,
  )
