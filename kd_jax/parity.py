"""Parity: how closely one form of a model computes what another does.

A model changes form when it is folded, converted to integers or exported; each
form is compared with the one it came from on the same batches. `compare` sees
functions of a batch, whatever they are; `check_parity` sees the layers of a
linen model. Owns no data and no models.
"""

import math
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from kd_jax import adapters, quantize, rules
from kd_jax.quantize import inputs, products
from kd_jax.quantize.activations import dynamic_scale
from kd_jax.quantize.stored import CODED, COLLECTION, weight_codes
from kd_jax.types import Batch, Variables, check_same_shape


class Parity(NamedTuple):
  """What `compare` found; numbers over all examples, padding left out.

  Attributes:
    agreement: share of examples with the same most likely class; an example
      with a NaN in either output disagrees.
    max_abs_error: the largest difference of any output; NaN if one is NaN.
    mean_abs_error: the mean difference of all outputs.
    sqnr_db: signal-to-quantization-noise ratio in decibels,
      10 log10(sum reference^2 / sum (reference - output)^2); inf when equal.
    examples: how many examples were compared.
  """

  agreement: float
  max_abs_error: float
  mean_abs_error: float
  sqnr_db: float
  examples: int


def compare(
  fn: Callable[[Batch], Any],
  reference: Callable[[Batch], Any],
  batches: Iterable[Batch],
) -> Parity:
  """Compares two functions on the same batches.

  Sums are taken in float64 on the host and divided once, so that batches of
  different sizes count by their examples.

  Args:
    fn: `batch -> [B, C]` outputs, any real dtype.
    reference: `batch -> [B, C]`, what `fn` should compute.
    batches: each may hold `mask`, `[B]`, 0 for padding, which is ignored
      whatever its outputs.

  Returns:
    The numbers.

  Raises:
    ValueError: if the outputs are not `[B, C]`, the mask is not `[B]`, or
      there is no example.

  Example:
    >>> logits = np.array([[2.0, 0.0], [0.0, 1.0], [7.0, 9.0]])
    >>> batch = {'logits': logits, 'mask': np.array([1, 1, 0])}
    >>> parity = compare(
    ...   lambda batch: batch['logits'] + np.array([0.0, 0.5]),
    ...   lambda batch: batch['logits'],
    ...   [batch],
    ... )
    >>> parity.agreement, parity.max_abs_error, parity.mean_abs_error
    (1.0, 0.5, 0.25)
    >>> f'{parity.sqnr_db:.2f} dB, {parity.examples} examples'
    '10.00 dB, 2 examples'
  """
  examples = agreed = outputs = 0
  largest = np.float64(0.0)
  error = signal = noise = 0.0
  for batch in batches:
    found, expected = _outputs(fn, reference, batch)
    examples += len(found)
    outputs += found.size
    nan = np.isnan(found).any(-1) | np.isnan(expected).any(-1)
    agreed += int(np.sum((found.argmax(-1) == expected.argmax(-1)) & ~nan))
    with np.errstate(invalid='ignore'):
      difference = np.abs(found - expected)
    # Two infinities of one sign are equal, though their difference is NaN.
    difference = np.where(found == expected, 0.0, difference)
    # np.maximum keeps a NaN; max() may drop it.
    largest = np.maximum(largest, difference.max(initial=0.0))
    error += float(difference.sum())
    noise += float(np.square(difference).sum())
    signal += float(np.square(expected).sum())
  if not examples:
    raise ValueError('compare: there is no example to compare on.')
  return Parity(
    agreement=agreed / examples,
    max_abs_error=float(largest),
    mean_abs_error=error / outputs,
    sqnr_db=_decibels(signal, noise),
    examples=examples,
  )


def require(parity: Parity, *, name: str, agreement: float = 0.995) -> None:
  """Raises ValueError if two forms of a model agree on too few examples.

  Args:
    parity: what `compare` returned.
    name: what was compared; begins the message.
    agreement: the share of examples to agree on, at least.

  Example:
    >>> require(Parity(0.98, 0.7, 0.1, 21.4, 500), name='ONNX int8')
    Traceback (most recent call last):
    ...
    ValueError: ONNX int8 agrees with its reference on 490 of 500 examples \
(98.00%), but 99.50% are required; largest error 0.7, SQNR 21.4 dB.
  """
  if parity.agreement >= agreement:
    return
  count = round(parity.agreement * parity.examples)
  raise ValueError(
    f'{name} agrees with its reference on {count} of {parity.examples} '
    f'examples ({parity.agreement:.2%}), but {agreement:.2%} are required; '
    f'largest error {parity.max_abs_error:.3g}, SQNR {parity.sqnr_db:.1f} dB.'
  )


class LayerParity(NamedTuple):
  """One layer of `check_parity`; decibels as in `Parity`.

  Errors are of the layer's output within the whole network, so that they hold
  what the layers before it added.

  Attributes:
    layer: its path.
    execution: 'static', observed grids and integer products; 'dynamic', the
      same with the range of the batch at hand; 'weights', codes dequantized in
      the product; 'inputs', no product on integers, but rounded inputs.
    fake_max_error: the largest difference of fake-quant and float outputs.
    fake_sqnr_db: of fake-quant against float.
    integer_max_error: the largest difference of integer and float outputs.
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
  fake_max_error: float
  fake_sqnr_db: float
  integer_max_error: float
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
    observer: as given to `convert`, and so is `weight_observer`.
    interceptors: others of the network, such as `prune.resized(...)`.
    train_argument: see `adapters.from_linen`.

  Returns:
    The layers that `convert` changed, and the outputs from end to end.

  Raises:
    ValueError: if the model's output is not `[B, C]`.

  References:
    Jacob et al., 2018, arXiv:1712.05877, for the arithmetic that is compared.
  """
  stored = _by_layer(integers[COLLECTION])
  taps = sorted(layer for layer in stored if layer)
  multiplying: set[str] = set()

  def forward(*quantizers):
    run = adapters.from_linen(
      model,
      taps=taps,
      interceptors=(
        *interceptors,
        _recorder(taps, multiplying),
        quantize.skip_folded_batch_norms,
        *quantizers,
      ),
      train_argument=train_argument,
    )
    return jax.jit(lambda v, b: run(v, b)[:2])

  rounded = jax.jit(lambda p: _rounded(p, weight_rules, weight_observer))(
    variables['params']
  )
  observed = quantize.quantize_activations(activation_rules, observer=observer)
  executed = quantize.execute_integers(dynamic=activation_rules)
  runs = {
    'float': forward()(variables, batch),
    'fake': forward(observed)({**variables, 'params': rounded}, batch),
    'integer': forward(executed)(integers, batch),
  }
  outputs = {name: run[0] for name, run in runs.items()}
  features = {name: run[1] for name, run in runs.items()}

  def pair(found, expected):
    return compare(
      lambda _: outputs[found], lambda _: outputs[expected], [batch]
    )

  layers = []
  for layer in taps:
    spec = rules.first(activation_rules, layer)
    values = {name: _float64(f[layer]) for name, f in features.items()}
    codes = _input_codes(layer, stored[layer], features['integer'], spec)
    layers.append(
      LayerParity(
        layer,
        _execution(stored[layer], spec, layer in multiplying),
        *_errors(values['fake'], values['float']),
        *_errors(values['integer'], values['float']),
        *_errors(values['integer'], values['fake']),
        max((s for s, _ in codes if s is not None), default=None),
        max((d for _, d in codes), default=None),
        _dead_weights(stored[layer]),
      )
    )
  return ParityReport(
    tuple(layers),
    fake=pair('fake', 'float'),
    integer=pair('integer', 'float'),
    exact=pair('integer', 'fake'),
  )


def _rounded(
  params: Any,
  weight_rules: rules.Rules[quantize.QuantSpec],
  observer: quantize.Observer | None,
) -> Any:
  if 'quant_steps' in params:
    return quantize.lsq_params(params, weight_rules)
  return quantize.fake_quant_params(params, weight_rules, observer=observer)


def print_parity(report: ParityReport, file: TextIO | None = None) -> None:
  """Prints a report of `check_parity` as a table, a line for each layer.

  Args:
    report: what it returned.
    file: where to; standard output when None.

  Example:
    >>> layer = LayerParity(
    ...   'conv', 'static', 0.1, 41.0, 0.1, 41.0, 0.0, math.inf, 0.0, 3, 200)
    >>> whole = Parity(1.0, 0.1, 0.01, 40.0, 8)
    >>> print_parity(ParityReport((layer,), whole, whole, whole))
    layer  runs    fake dB  int8 dB  int8-fake  max error  saturated  dead in  \
dead w
    conv   static     41.0     41.0        inf          0     0.00 %        3  \
   200
    outputs: fake-quant 40.0 dB, agrees on 100.00 % with float
    outputs: integers   40.0 dB, agrees on 100.00 % with float
    outputs: integers   40.0 dB, agrees on 100.00 % with fake-quant
  """
  titles = (
    'layer',
    'runs',
    'fake dB',
    'int8 dB',
    'int8-fake',
    'max error',
    'saturated',
    'dead in',
    'dead w',
  )
  lines: list[tuple[str, ...]] = [titles]
  for row in report.layers:
    share = '-' if row.saturation is None else f'{100 * row.saturation:.2f} %'
    dead = ['-' if n is None else str(n) for n in row[-2:]]
    decibels = (row.fake_sqnr_db, row.integer_sqnr_db, row.sqnr_db)
    lines.append(
      (
        row.layer,
        row.execution,
        *(f'{value:.1f}' for value in decibels),
        f'{row.max_error:.3g}',
        share,
        *dead,
      )
    )
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  for line in lines:
    words = [
      word.ljust(width) if i < 2 else word.rjust(width)
      for i, (word, width) in enumerate(zip(line, widths, strict=True))
    ]
    print('  '.join(words), file=file or sys.stdout)
  ends = (
    ('fake-quant', report.fake, 'float'),
    ('integers  ', report.integer, 'float'),
    ('integers  ', report.exact, 'fake-quant'),
  )
  for name, parity, reference in ends:
    print(
      f'outputs: {name} {parity.sqnr_db:.1f} dB, agrees on '
      f'{parity.agreement:.2%} with {reference}'.replace('%', ' %'),
      file=file or sys.stdout,
    )


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


def _recorder(taps: Iterable[str], multiplying: set[str]) -> Callable[..., Any]:
  """An interceptor that keeps the inputs of layers beside their outputs.

  It adds to `multiplying` the layers that multiply their inputs.
  """
  wanted = frozenset(taps)

  def interceptor(next_fun, args, kwargs, context):
    module = context.module
    called = context.method_name == '__call__'
    if called and _multiplies_inside(module, wanted):
      with inputs.replaced_products(module, _recorded(module, multiplying)):
        return next_fun(*args, **kwargs)
    if called and '/'.join(module.path) in wanted:
      if products.is_attention(module):
        multiplying.add('/'.join(module.path))
      values, _ = products.arguments(module, args, kwargs)
      for i, x in enumerate(values):
        if products.is_input(x):
          name = inputs.input_name(i)
          module.scope.put_variable('intermediates', name, (x,))
    return next_fun(*args, **kwargs)

  return interceptor


def _multiplies_inside(module: Any, wanted: Collection[str]) -> bool:
  """Whether products of linen's attention are among the layers."""
  return inputs.is_attention(module) and any(
    '/'.join((*module.path, product)) in wanted for product in inputs.PRODUCTS
  )


def _recorded(module: Any, multiplying: set[str]) -> Callable[..., Any]:
  """Computes a product of linen's attention, and keeps what it was given."""

  def compute(product, einsum, equation, *operands):
    multiplying.add('/'.join((*module.path, product)))
    y = einsum(equation, *operands)
    kept = {inputs.input_name(i): (x,) for i, x in enumerate(operands)}
    kept['__call__'] = (y,)
    module.scope.put_variable('intermediates', product, kept)
    return y

  return compute


def _execution(
  layer: Mapping[str, Any], spec: quantize.QuantSpec | None, multiplies: bool
) -> str:
  if 'kernel' not in layer and not multiplies:
    return 'weights' if 'embedding' in layer else 'inputs'
  if 'input0' in layer:
    return 'static'
  return 'dynamic' if spec is not None and spec.dynamic else 'weights'


def _errors(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
  difference = found - expected
  noise, signal = np.square(difference).sum(), np.square(expected).sum()
  error = np.abs(difference).max(initial=0.0)
  return float(error), _decibels(float(signal), float(noise))


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


def _outputs(
  fn: Callable[[Any], Any],
  reference: Callable[[Any], Any],
  batch: Mapping[str, Any],
) -> tuple[np.ndarray, np.ndarray]:
  """Both outputs of the examples that are not padding, float64."""
  found, expected = np.asarray(fn(batch)), np.asarray(reference(batch))
  check_same_shape('compare', fn=found, reference=expected)
  if found.ndim != 2:
    raise ValueError(
      f'compare: outputs must be [B, C] but have shape {found.shape}.'
    )
  mask = np.asarray(batch.get('mask', np.ones(len(found))))
  if mask.shape != found.shape[:1]:
    raise ValueError(
      f'compare: mask has shape {mask.shape} but outputs have {found.shape}.'
    )
  real = mask > 0
  return found[real].astype(np.float64), expected[real].astype(np.float64)


def _decibels(signal: float, noise: float) -> float:
  if noise == 0:
    return math.inf
  if signal == 0:
    return -math.inf
  return 10 * (math.log10(signal) - math.log10(noise))
