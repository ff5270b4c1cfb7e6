"""Published methods by name: their terms, as words of a configuration.

`METHODS` are those that people compare, each as words for `terms` with the
weights of its paper, its authors' code, or ours. Owns no formula, and none of
the training around a method: optimizer, schedule and data are in `published`.
"""

from typing import Any, NamedTuple


class Method(NamedTuple):
  """A published method.

  Attributes:
    title: its name in tables.
    paper: authors, year and arXiv number or venue.
    terms: for `make_objective`.
    weights: who chose the weights: 'paper', 'code' (its authors' or the CRD
      benchmark's for CIFAR-100), or 'ours' where publications leave them open.
    scheme: changes to the run besides the terms; see `kd_jax.defaults`.

  Example:
    >>> METHODS['kd'].terms['ce'], METHODS['kd'].weights
    ({'name': 'hard_labels', 'weight': 0.1}, 'code')
  """

  title: str
  paper: str
  terms: dict[str, dict[str, Any]]
  weights: str = 'code'
  scheme: dict[str, Any] = {}


def _ce(weight: float = 1.0, **options: Any) -> dict[str, Any]:
  return {'ce': {'name': 'hard_labels', 'weight': weight, **options}}


def _with_ce(name: str, weight: Any, **options: Any) -> dict[str, Any]:
  """Cross-entropy with weight 1 and one term."""
  return _ce() | {name: {'name': name, 'weight': weight, **options}}


def _soft(name: str, **options: Any) -> dict[str, Any]:
  """The weights of KD, with another distance between the outputs."""
  return _ce(0.1) | {name: {'name': name, 'weight': 0.9, **options}}


_KD = _soft('soft_targets', temperature=4.0)
# The 20 of 240 epochs over which some methods' weights rise.
_WARM = 20 / 240

METHODS: dict[str, Method] = {
  'alone': Method('student alone', 'no teacher', _ce(), 'paper'),
  'label_smoothing': Method(
    'label smoothing',
    'Szegedy et al. 2015, arXiv:1512.00567',
    _ce(label_smoothing=0.1),
    'paper',
  ),
  'teacher_free': Method(
    'Tf-KD',
    'Yuan et al. 2019, arXiv:1909.11723',
    _with_ce('teacher_free', 0.1),
    'ours',
  ),
  'kd': Method('KD', 'Hinton et al. 2015, arXiv:1503.02531', _KD),
  'logit_mse': Method(
    'logit MSE',
    'Ba, Caruana 2013, arXiv:1312.6184',
    _soft('logit_matching'),
    'ours',
  ),
  'logit_huber': Method(
    'logit Huber',
    'Huber 1964; as a logit loss, ours',
    _soft('logit_matching', huber_delta=1.0),
    'ours',
  ),
  'reverse_kl': Method(
    'reverse KL',
    'Gu et al. 2023, arXiv:2306.08543',
    _soft('reverse_kl', temperature=4.0),
    'ours',
  ),
  'jensen_shannon': Method(
    'Jensen-Shannon',
    'Agarwal et al. 2023, arXiv:2306.13649',
    _soft('jensen_shannon', beta=0.5),
    'ours',
  ),
  'skew_kl': Method(
    'skew KL',
    'Ko et al. 2024, arXiv:2402.03898',
    _soft('skew_kl', alpha=0.1),
    'ours',
  ),
  'hard': Method(
    'hard teacher labels',
    'Touvron et al. 2020, arXiv:2012.12877',
    _ce(0.5) | {'hard': {'name': 'hard_distillation', 'weight': 0.5}},
    'paper',
  ),
  'top_k': Method(
    'top-k targets',
    'Shen, Xing 2021, arXiv:2112.01528',
    _soft('top_k', k=5, temperature=4.0, tail='uniform'),
    'ours',
  ),
  'dkd': Method(
    'DKD',
    'Zhao et al. 2022, arXiv:2203.08679',
    _with_ce(
      'decoupled_kd',
      {'end': 1.0, 'until': _WARM},
      alpha=1.0,
      beta=8.0,
      temperature=4.0,
    ),
  ),
  'nkd': Method(
    'NKD',
    'Yang et al. 2023, arXiv:2303.13005',
    _with_ce('normalized_kd', 1.0, gamma=1.5, temperature=1.0),
  ),
  'dist': Method(
    'DIST',
    'Huang et al. 2022, arXiv:2205.10536',
    _with_ce('dist', 2.0, beta=1.0, gamma=1.0, temperature=4.0),
  ),
  'logit_standardization': Method(
    'KD + logit std.',
    'Sun et al. 2024, arXiv:2403.01427',
    _ce(0.1)
    | {
      'kd': {
        'name': 'soft_targets',
        'weight': 9.0,
        'temperature': 2.0,
        'standardize': True,
      }
    },
  ),
  'mlkd': Method(
    'MLKD',
    'Jin et al. 2023, CVPR',
    _with_ce('multi_level', 1.0),
    'ours',
  ),
  'fitnet': Method(
    'FitNet',
    'Romero et al. 2014, arXiv:1412.6550',
    _with_ce('hints', 100.0),
  ),
  'at': Method(
    'AT',
    'Zagoruyko, Komodakis 2016, arXiv:1612.03928',
    _with_ce('attention_transfer', 1000.0),
  ),
  'fsp': Method('FSP', 'Yim et al. 2017, CVPR', _with_ce('flow', 50.0)),
  'nst': Method(
    'NST',
    'Huang, Wang 2017, arXiv:1707.01219',
    _with_ce('neuron_selectivity', 50.0),
  ),
  'vid': Method(
    'VID',
    'Ahn et al. 2019, arXiv:1904.05835',
    _with_ce('variational_information', 1.0),
  ),
  'ab': Method(
    'AB',
    'Heo et al. 2018, arXiv:1811.03233',
    {
      'ce': {
        'name': 'hard_labels',
        'weight': {'end': 1.0, 'until': 30 / 270, 'shape': 'step'},
      },
      'ab': {
        'name': 'activation_boundary',
        'weight': {
          'start': 3.0,
          'end': 0.0,
          'until': 30 / 270,
          'shape': 'step',
        },
      },
    },
  ),
  'ft': Method(
    'FT',
    'Kim et al. 2018, arXiv:1802.04977',
    _with_ce('factor_transfer', 200.0),
  ),
  'ofd': Method(
    'OFD', 'Heo et al. 2019, arXiv:1904.01866', _with_ce('overhaul', 1.0)
  ),
  'review': Method(
    'ReviewKD',
    'Chen et al. 2021, arXiv:2104.09044',
    _with_ce('review', {'end': 5.0, 'until': _WARM}),
  ),
  'mgd': Method(
    'MGD',
    'Yang et al. 2022, arXiv:2205.01529',
    _with_ce('masked_generation', 7e-5),
  ),
  'srrl': Method(
    'SRRL', 'Yang et al. 2021, ICLR', _with_ce('softmax_regression', 1.0)
  ),
  'cat': Method(
    'CAT-KD',
    'Guo et al. 2023, arXiv:2304.12777',
    _with_ce('class_attention', 15.0),
  ),
  'kdpp': Method(
    'KD++',
    'Wang et al. 2023, arXiv:2305.17007',
    _KD | {'nd': {'name': 'norm_direction', 'weight': 2.0}},
  ),
  'simkd': Method(
    'SimKD',
    'Chen et al. 2022, arXiv:2203.14001',
    {'features': {'name': 'features', 'weight': 1.0, 'student': 'projector'}},
    'paper',
    {'reuse_head': True},
  ),
  'rkd': Method(
    'RKD', 'Park et al. 2019, arXiv:1904.05068', _with_ce('relational', 1.0)
  ),
  'sp': Method(
    'SP',
    'Tung, Mori 2019, arXiv:1907.09682',
    _with_ce('similarity_preserving', 3000.0),
  ),
  'pkt': Method(
    'PKT',
    'Passalis, Tefas 2018, arXiv:1803.10837',
    _with_ce('probabilistic_transfer', 30000.0),
  ),
  'cc': Method(
    'CC',
    'Peng et al. 2019, arXiv:1904.01802',
    _with_ce('correlation_congruence', 0.02),
  ),
  'crd': Method(
    'CRD',
    'Tian et al. 2019, arXiv:1910.10699',
    _with_ce('contrastive', 0.8),
  ),
  'crd_kd': Method(
    'CRD + KD',
    'Tian et al. 2019, arXiv:1910.10699',
    _with_ce('contrastive', 0.8)
    | {'kd': {'name': 'soft_targets', 'weight': 1.0, 'temperature': 4.0}},
  ),
  'saliency': Method(
    'input gradients',
    'Zagoruyko, Komodakis 2016, arXiv:1612.03928',
    _KD
    | {
      'gradients': {'name': 'input_gradients', 'weight': 1.0, 'normalize': True}
    },
    'ours',
  ),
  'sobolev': Method(
    'Sobolev',
    'Czarnecki et al. 2017, arXiv:1706.04859',
    _KD | {'sobolev': {'name': 'sobolev', 'weight': 1.0}},
    'ours',
  ),
  'jacobian': Method(
    'Jacobian matching',
    'Srinivas, Fleuret 2018, arXiv:1803.00443',
    _KD | {'jacobians': {'name': 'jacobians', 'weight': 1.0}},
    'ours',
  ),
  'self': Method(
    'self-distillation',
    'Zhang et al. 2019, arXiv:1905.08094',
    _with_ce('self_distillation', 1.0),
    'ours',
  ),
  'mean_teacher': Method(
    'EMA teacher',
    'Tarvainen, Valpola 2017, arXiv:1703.01780',
    _ce()
    | {
      'kd': {
        'name': 'soft_targets',
        'weight': {'end': 1.0, 'until': 0.5},
        'temperature': 1.0,
      }
    },
    'ours',
    {'ema': 0.99},
  ),
  'dml': Method(
    'DML',
    'Zhang et al. 2017, arXiv:1706.00384',
    _ce(),
    'paper',
    {'cohort': 2},
  ),
  'born_again': Method(
    'born-again, 2 generations',
    'Furlanello et al. 2018, arXiv:1805.04770',
    _KD,
    'ours',
    {'generations': 2},
  ),
  'label_free': Method(
    'KD without labels',
    'Beyer et al. 2021, arXiv:2106.05237',
    {'kd': {'name': 'soft_targets', 'weight': 1.0, 'temperature': 1.0}},
    'paper',
  ),
}
