"""Float, fake-quant and integer execution of a linen model, layer by layer.

Owns what is said of a layer: errors, saturation, codes that do not occur.
Recording it is in `recording`, printing it in `table`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from kd_jax import adapters, quantize, rules
from kd_jax.parity.outputs import Parity, compare, decibels
from kd_jax.parity.recording import recorder
from kd_jax.quantize.activations import dynamic_scale
from kd_jax.quantize.stored import CODED, COLLECTION, weight_codes
from kd_jax.types import Batch, Variables


class LayerParity(NamedTuple):
  """One layer of `check_parity`; decibels as in `Parity`.

  Errors are of the layer's output within the whole network, so that they hold
  what the layers before it added.

  Attributes:
    layer: its path.
    execution: 'static', observed grids and integer products; 'dynamic', the
      same with the range of the batch at hand; 'weights', codes dequantized in
      the product; 'inputs', no product on integers, but rounded inputs.
    fake_sqnr_db: of fake-quant against float.
    integer_sqnr_db: of integers against float.
    max_error: the largest difference of integer and fake-quant outputs.
    sqnr_db: of integers against fake-quant.
    saturation: the share of the inputs' values beyond the ends of their grid,
      of the input with the most; None without a stored grid.
    dead_inputs: how many of an input's 256 codes do not occur in the batch, of
      the input with the most; None without codes.
    dead_weights: how many of the 255 (of 4 bits: 15) codes of the weights do
      not occur; None without codes.
  """

  layer: str
  execution: str
  fake_sqnr_db: float
  integer_sqnr_db: float
  max_error: float
  sqnr_db: float
  saturation: float | None
  dead_inputs: int | None
  dead_weights: int | None


class ParityReport(NamedTuple):
  """What `check_parity` found.

  Attributes:
    layers: in the order of their paths.
    fake: the outputs of fake-quant against float.
    integer: of integers against float.
    exact: of integers against fake-quant.
  """

  layers: tuple[LayerParity, ...]
  fake: Parity
  integer: Parity
  exact: Parity

  def rows(self) -> list[dict[str, Any]]:
    """One dict per layer, by the names of `LayerParity`; JSON values."""
    return [layer._asdict() for layer in self.layers]


def check_parity(
  model: adapters.LinenModule,
  variables: Variables,
  integers: Variables,
  batch: Batch,
  *,
  weight_rules: rules.Rules[quantize.QuantSpec],
  activation_rules: rules.Rules[quantize.QuantSpec] = (),
  observer: quantize.Observer | None = None,
  weight_observer: quantize.Observer | None = None,
  interceptors: Sequence[adapters.Interceptor] = (),
  train_argument: str | None = 'train',
) -> ParityReport:
  """Compares float, fake-quant and integer execution layer by layer.

  Args:
    model: the module; it is not edited. A scanned stack has to lift the
      collection `intermediates`.
    variables: what `quantize.convert` was given, as from `deploy.calibrated`:
      `params`, folded where BatchNorm was, and `quant_stats` where activations
      were observed.
    integers: what it returned.
    batch: one batch, pre-processed.
    weight_rules: as given to `convert`.
    activation_rules: as given to `convert`.
    observer: as given to `convert`.
    weight_observer: as given to `convert`; not read where the weights have
      learned steps.
    interceptors: others of the network, such as `prune.resized(...)`.
    train_argument: see `adapters.from_linen`.

  Returns:
    The layers that `convert` changed, and the outputs from end to end.

  Raises:
    ValueError: if the model's output has no two axes.

  Example:
    >>> from kd_jax import models
    >>> from kd_jax.deploy import WEIGHT_RULES
    >>> model = models.MLP(num_classes=2, hidden=(), reads='x')
    >>> kernel = jnp.array([[3.0, 0.5], [2.0, 0.26]])
    >>> variables = {'params': {'head': {
    ...   'kernel': kernel, 'bias': jnp.zeros(2)}}}
    >>> integers = quantize.convert(variables, WEIGHT_RULES, ())
    >>> report = check_parity(
    ...   model, variables, integers, {'x': jnp.array([[0.0, 1.0]])},
    ...   weight_rules=WEIGHT_RULES)
    >>> report.layers[0].layer, report.layers[0].execution
    ('head', 'weights')
    >>> round(report.fake.max_abs_error, 4)  # 2 is the code 85 of 3 / 127
    0.0079
    >>> report.exact.max_abs_error < 1e-6
    True

  References:
    Jacob et al., 2017, arXiv:1712.05877, for the arithmetic that is compared.
  """
  stored = _by_layer(integers[COLLECTION])
  taps = sorted(layer for layer in stored if layer)
  multiplying: set[str] = set()
  given = (
    *interceptors,
    recorder(taps, multiplying),
    quantize.skip_folded_batch_norms,
  )

  def run(variables, *quantizers):
    forward = adapters.from_linen(
      model,
      taps=taps,
      interceptors=(*given, *quantizers),
      train_argument=train_argument,
    )
    return jax.jit(lambda v, b: forward(v, b)[:2])(variables, batch)

  rounded = jax.jit(lambda p: _rounded(p, weight_rules, weight_observer))(
    variables['params']
  )
  observed = quantize.quantize_activations(activation_rules, observer=observer)
  executed = quantize.execute_integers(dynamic=activation_rules)
  real, real_features = run(variables)
  fake, fake_features = run({**variables, 'params': rounded}, observed)
  integer, integer_features = run(integers, executed)
  layers = tuple(
    _layer(
      layer,
      stored[layer],
      (real_features, fake_features, integer_features),
      rules.first(activation_rules, layer),
      layer in multiplying,
    )
    for layer in taps
  )

  def pair(found, expected):
    return compare(lambda _: found, lambda _: expected, [batch])

  return ParityReport(
    layers,
    fake=pair(fake, real),
    integer=pair(integer, real),
    exact=pair(integer, fake),
  )


def _layer(
  layer: str,
  stored: Mapping[str, Any],
  features: tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]],
  spec: quantize.QuantSpec | None,
  multiplies: bool,
) -> LayerParity:
  """One layer by the features of float, fake-quant and integers."""
  real, fake, integer = (_float64(f[layer]) for f in features)
  codes = _input_codes(layer, stored, features[-1], spec)
  return LayerParity(
    layer,
    _execution(stored, spec, multiplies),
    fake_sqnr_db=_decibels(fake, real),
    integer_sqnr_db=_decibels(integer, real),
    max_error=float(np.abs(integer - fake).max(initial=0.0)),
    sqnr_db=_decibels(integer, fake),
    saturation=max((s for s, _ in codes if s is not None), default=None),
    dead_inputs=max((d for _, d in codes), default=None),
    dead_weights=_dead_weights(stored),
  )


def _rounded(
  params: Any,
  weight_rules: rules.Rules[quantize.QuantSpec],
  observer: quantize.Observer | None,
) -> Any:
  if 'quant_steps' in params:
    return quantize.lsq_params(params, weight_rules)
  return quantize.fake_quant_params(params, weight_rules, observer=observer)


def _by_layer(stored: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """layer path -> its entries in the collection, inputs as dicts."""
  layers: dict[str, dict[str, Any]] = {}
  for path, value in traverse_util.flatten_dict(stored).items():
    nested = path[-1] in ('scale', 'zero_point')
    layer = layers.setdefault('/'.join(path[: -1 - nested]), {})
    if nested:
      layer.setdefault(path[-2], {})[path[-1]] = value
    else:
      layer[path[-1]] = value
  return layers


def _execution(
  layer: Mapping[str, Any], spec: quantize.QuantSpec | None, multiplies: bool
) -> str:
  if 'kernel' not in layer and not multiplies:
    return 'weights' if 'embedding' in layer else 'inputs'
  if 'input0' in layer:
    return 'static'
  return 'dynamic' if spec is not None and spec.dynamic else 'weights'


def _decibels(found: np.ndarray, expected: np.ndarray) -> float:
  signal, noise = np.square(expected).sum(), np.square(found - expected).sum()
  return decibels(float(signal), float(noise))


def _float64(x: Any) -> np.ndarray:
  return np.asarray(x, np.float64)


def _input_codes(
  layer: str,
  stored: Mapping[str, Any],
  features: Mapping[str, Any],
  spec: quantize.QuantSpec | None,
) -> list[tuple[float | None, int]]:
  """`(saturation, dead codes)` of each quantized input of a layer."""
  found = []
  for path, x in features.items():
    owner, _, name = path.rpartition('/')
    if owner != layer or not re.fullmatch(r'input\d+', name):
      continue
    grid = stored.get(name)
    if grid is not None:
      shape = grid['scale'].shape
      wide = (*shape, *(1,) * (x.ndim - len(shape)))
      scale = _float64(grid['scale']).reshape(wide)
      zero_point = _float64(grid['zero_point']).reshape(wide)
    elif spec is not None and spec.dynamic:
      scale, zero_point = map(_float64, dynamic_scale(x, spec))
    else:
      continue
    code = np.round(_float64(x) / scale) + zero_point
    outside = float(np.mean((code < -128) | (code > 127)))
    used = len(np.unique(np.clip(code, -128, 127)))
    found.append((outside if grid is not None else None, 256 - used))
  return found


def _dead_weights(layer: Mapping[str, Any]) -> int | None:
  for name in CODED:
    if name in layer:
      stored = layer[name]
      codes = weight_codes(stored, layer[f'{name}_scale']).code
      levels = 15 if stored.dtype == jnp.uint8 else 255
      return levels - len(np.unique(np.asarray(codes)))
  return None
