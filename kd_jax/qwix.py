"""Our quantization rules as those of Qwix, and back.

Owns the translation, for what Qwix has and we do not: 8-bit floats, rounded
gradients, TPU kernels. Quantization itself is in `quantize`. Qwix is the extra
`[qwix]`; it is imported when a function here is called.

A weight rule for `<module>/kernel` and an activation rule for `<module>` become
one rule for the module. What Qwix computes with it, of version 0.1.8:

- Its symmetric step is max|x| / 127.5, 7.5 at 4 bits, and it uses the code
  -128. `narrow` specs ask it for max|x| / 127, 'absmax,1.0039...', and then the
  codes are ours; those with `narrow=False` get Qwix's own step, 0.4 % smaller
  than ours, 6.7 % at 4 bits.
- Affine ranges have our scale and zero point, but x / scale + zero_point is
  rounded as a sum: a tie may go to the other code.
- Scales have the tensor's dtype; ours are float32.
- Channels of a weight are all axes that the product does not sum over. Of
  activations with dynamic ranges they are too: tokens have one each, where
  `axis=0` gives examples one each. In convolutions they are the same.
- A static range is the mean over all batches so far, in convolutions also over
  the examples of a batch; ours is a moving average of the batch's extremes. A
  dense layer has the same range in its first batch.
- Gradients pass to values outside of a static range too. Without `bwd_qtype`
  the backward product of a dense layer takes the values before rounding, ours
  those after it.
- Convolutions know no groups along the reduction; weights, inputs and, with
  `bwd_qtype`, gradients have to be of one type there, which CPUs and GPUs have
  no int4 products for. Weights alone may be int4.
- In a module with a rule both operands of other products are rounded too, such
  as attention's, the second one with a scale per channel. Additions, pooling
  and embeddings stay in float.
"""

import dataclasses
import importlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from kd_jax import rules as rules_lib
from kd_jax.quantize import QuantSpec

PROVIDERS = {'train': 'QtProvider', 'serve': 'PtqProvider'}
_TYPES = {8: 'int8', 4: 'int4'}
_EVERYTHING = '.*'
# A range per tensor in dense layers too, where Qwix would have one per row.
_WHOLE_BATCH = {'lhs_disable_channelwise_axes': True}


def to_qwix(
  weight_rules: rules_lib.Rules[QuantSpec],
  activation_rules: rules_lib.Rules[QuantSpec] = (),
  **options: Any,
) -> list[Any]:
  """Rules for Qwix that quantize what ours do; see above how they differ.

  Args:
    weight_rules: `(pattern, QuantSpec or None)` pairs on parameter paths that
      end in '/kernel'. The axis is None, or the output channels: -1, or a tuple
      of 0, -2 and -1 for stacks and projections by head.
    activation_rules: likewise on layer paths. An `axis` of 0 goes with
      `dynamic` and weights per channel, None with static ranges or weights per
      tensor.
    **options: fields of `qwix.QtRule` for all rules that quantize, over those
      made here: `bwd_qtype`, `bwd_stochastic_rounding`, or other types, as
      `weight_qtype='float8_e4m3fn'`, which reset the calibration to 'absmax'.
      Those whose name begins with `act_` go to rules with activations.

  Returns:
    `qwix.QtRule`s, first match wins, for `qwix.QtProvider` and others.

  Raises:
    ValueError: for what Qwix cannot express, by name: weights with zero
      points, narrow affine ranges, other axes, groups together with
      activations, activations of layers whose weights stay in float.
    ImportError: without Qwix.

  Example:
    >>> from kd_jax.quantize import INT8_ACTIVATIONS, INT8_WEIGHTS
    >>> [rule] = to_qwix(
    ...   [('.*/kernel', INT8_WEIGHTS)], [('.*', INT8_ACTIVATIONS)])
    >>> rule.module_path, rule.weight_qtype, rule.act_calibration_method
    ('.*', 'int8', 'minmax')
    >>> [rule] = to_qwix(
    ...   [('.*/kernel', INT8_WEIGHTS)],
    ...   weight_qtype='float8_e4m3fn', bwd_qtype='float8_e4m3fn')
    >>> rule.weight_calibration_method
    'absmax'
  """
  qwix = _import_qwix()
  known = {f.name for f in dataclasses.fields(qwix.QtRule)}
  for name in options:
    rules_lib.choose('option of qwix.QtRule', name, dict.fromkeys(known))
  modules = [
    (module, spec)
    for pattern, spec in weight_rules
    if (module := _module(pattern, spec)) is not None
  ]
  for i, (pattern, spec) in enumerate(activation_rules):
    if spec is not None:
      _check_reach(pattern, modules, activation_rules[:i])
  # By pattern: of two rules with the same one the second is never reached.
  made: dict[str, Any] = {}
  for module, weight in modules:
    if weight is None:
      made.setdefault(module, {})
      continue
    for pattern, activation in (*activation_rules, (_EVERYTHING, None)):
      path = _both(module, pattern)
      if path is not None and path not in made:
        made[path] = _fields(path, weight, activation, options)
      if path == module:
        break
  return [qwix.QtRule(module_path=path, **made[path]) for path in made]


def from_qwix(
  qwix_rules: Sequence[Any],
) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
  """Our rules for what Qwix's quantize; see above how they differ.

  Args:
    qwix_rules: `qwix.QuantizationRule`s or `qwix.QtRule`s.

  Returns:
    `(weight_rules, activation_rules)`. A dense layer that is the whole model
    has a 'kernel' without a module, which no '.*/kernel' matches.

  Raises:
    ValueError: for what `QuantSpec` cannot express, by name: other types than
      int8 and int4, calibration by other than extremes, rules for some
      operations only, quantized gradients.

  Example:
    >>> import qwix
    >>> rule = qwix.QuantizationRule(module_path='head', weight_qtype='int8')
    >>> weight_rules, activation_rules = from_qwix([rule])
    >>> weight_rules[0][0], weight_rules[0][1].narrow, activation_rules
    ('head/kernel', False, [])
  """
  weights, activations = [], []
  for rule in qwix_rules:
    module = rule.module_path
    group = f'(?:{module})' if '|' in module else module
    weight, activation = _specs(rule)
    weights.append((f'{group}/kernel' if group else 'kernel', weight))
    activations.append((group, activation))
  return _without_end(weights), _without_end(activations)


def quantize_model(
  model: Any,
  weight_rules: rules_lib.Rules[QuantSpec],
  activation_rules: rules_lib.Rules[QuantSpec] = (),
  *,
  provider: str = 'train',
  inputs: Sequence[Any] = (),
  **options: Any,
) -> Any:
  """A model whose products Qwix quantizes, for `adapters.from_linen` or nnx.

  Args:
    model: a linen or nnx module, which is not changed.
    weight_rules: see `to_qwix`, and so are `activation_rules` and `options`.
    provider: 'train' rounds in forward and, with `bwd_qtype`, in backward
      passes of float weights (QAT, quantized training); 'serve' runs on
      integer weights, which `qwix.quantize_params` makes.
    inputs: arguments of the model's call; for nnx modules, which Qwix runs
      once.

  Returns:
    A module of the same kind. Static ranges are in its collection
    `quant_stats`, so initialise it, not the model that was given.

  Raises:
    ValueError: see `to_qwix`; for an unknown provider; for weights per tensor
      with 'serve'.
    ImportError: without Qwix.

  Example:
    >>> import jax
    >>> from kd_jax import adapters, models
    >>> from kd_jax.quantize import INT8_WEIGHTS, QuantSpec
    >>> model = models.make_model('mlp', num_classes=2, hidden=(3,))
    >>> rules = [('.*/kernel', INT8_WEIGHTS)]
    >>> quantized = quantize_model(model, rules, [
    ...   ('.*', QuantSpec(axis=0, dynamic=True))])
    >>> x = jax.numpy.ones((4, 2, 2, 1))
    >>> forward = adapters.from_linen(quantized)
    >>> variables = quantized.init(jax.random.key(0), x)
    >>> forward(variables, {'image': x}).output.shape
    (4, 2)
  """
  qwix = _import_qwix()
  name = rules_lib.choose('provider', provider, PROVIDERS)
  made = to_qwix(weight_rules, activation_rules, **options)
  for rule in made:
    if provider == 'serve' and rule.disable_channelwise_axes:
      raise ValueError(
        f"Qwix's {name} has a scale for each output channel: {rule.module_path}"
        ' asks for one per tensor.'
      )
  return qwix.quantize_model(model, getattr(qwix, name)(made), *inputs)


def _import_qwix() -> Any:
  try:
    return importlib.import_module('qwix')
  except ImportError as e:
    raise ImportError(
      "kd_jax.qwix needs Qwix: pip install 'kd_jax[qwix]'."
    ) from e


# --- patterns


def _module(pattern: str, spec: QuantSpec | None) -> str | None:
  """The modules whose kernels a weight rule is for; None if it is for none."""
  inside = pattern
  while inside != (inside := re.sub(r'\([^()]*\)', '', inside)):
    pass
  if '|' not in inside:
    if pattern == 'kernel':
      return ''
    if pattern.endswith('/kernel'):
      return pattern.removesuffix('/kernel')
    if spec is None and pattern == _EVERYTHING:
      return pattern
    if spec is None and pattern.endswith('/.*'):
      return f'{pattern.removesuffix("/.*")}(/.*)?'
    if spec is None and re.fullmatch(r'.*\b\w+', pattern):
      return None
  raise ValueError(
    f'Qwix quantizes the kernels of modules: weight rule {pattern!r} has to '
    "end in '/kernel'."
  )


def _both(module: str, pattern: str) -> str | None:
  """A pattern of what both match; None if that is surely nothing."""
  if pattern in (_EVERYTHING, module):
    return module
  for one, other in ((module, pattern), (pattern, module)):
    if re.fullmatch(r'[\w/]*', one):
      return one if re.fullmatch(other, one) else None
  if module == _EVERYTHING:
    return pattern
  return rf'(?=(?:{module})\Z)(?:{pattern})'


def _check_reach(
  pattern: str,
  modules: Iterable[tuple[str, QuantSpec | None]],
  before: Sequence[tuple[str, QuantSpec | None]],
) -> None:
  """Raises if an activation rule may reach a layer with float weights."""
  for module, weight in modules:
    if weight is None and _both(module, pattern) is not None:
      if not any(p in (module, _EVERYTHING) and s is None for p, s in before):
        raise ValueError(
          'Qwix quantizes no inputs where weights stay in float: put '
          f'({module!r}, None) before the activation rule {pattern!r}.'
        )
    elif weight is not None and _both(module, pattern) == pattern:
      return
  raise ValueError(
    'Qwix quantizes no inputs where weights stay in float: activation rule '
    f'{pattern!r} needs a weight rule {f"{pattern}/kernel"!r}.'
  )


def _without_end(rules: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
  """Without the last rules that leave out what nothing would match."""
  while rules and rules[-1][1] is None:
    rules = rules[:-1]
  return rules


# --- quantizers


def _fields(
  path: str,
  weight: QuantSpec,
  activation: QuantSpec | None,
  options: Mapping[str, Any],
) -> dict[str, Any]:
  """The fields of a rule from what quantizes its weights and inputs."""
  per_tensor = weight.axis is None
  _check_weight(path, weight, activation)
  fields: dict[str, Any] = {
    'weight_qtype': _TYPES[weight.bits],
    'weight_calibration_method': _calibration(path, weight),
    'tile_size': weight.group_size,
    'disable_channelwise_axes': per_tensor,
  }
  if activation is not None:
    _check_activation(path, activation, per_tensor)
    fields |= {
      'act_qtype': _TYPES[activation.bits],
      'act_calibration_method': _calibration(path, activation),
      'act_static_scale': not activation.dynamic,
    }
    if not activation.dynamic and not per_tensor:
      fields['additional_qt_config'] = _WHOLE_BATCH
  for kind in ('weight', 'act'):
    if f'{kind}_qtype' in options:
      fields[f'{kind}_calibration_method'] = 'absmax'
  fields |= options
  if activation is None:
    fields = {k: v for k, v in fields.items() if not k.startswith('act_')}
  elif fields.get('bwd_qtype') and 'minmax' in fields['act_calibration_method']:
    raise ValueError(
      f'Rule {path!r}: bwd_qtype needs symmetric activations; gradients of '
      'Qwix leave zero points out.'
    )
  return fields


def _check_weight(
  path: str, weight: QuantSpec, activation: QuantSpec | None
) -> None:
  axes = weight.axis if isinstance(weight.axis, tuple) else (weight.axis,)
  channels = -1 in axes and {*axes} <= {0, -2, -1}
  if not weight.symmetric:
    raise ValueError(f'Rule {path!r}: Qwix has no zero points of weights.')
  if weight.axis is not None and not channels:
    raise ValueError(
      f'Rule {path!r}: Qwix has a scale per output channel, axis=-1, or per '
      f'tensor, axis=None, not axis={weight.axis}.'
    )
  if weight.group_size is not None and not channels:
    raise ValueError(
      f'Rule {path!r}: Qwix has groups of each output channel, axis=-1, not '
      f'group_size={weight.group_size} with axis=None.'
    )
  if weight.group_size is not None and activation is not None:
    raise ValueError(
      f'Rule {path!r}: Qwix would divide the activations into groups of '
      f'group_size={weight.group_size} too; use it for weights alone.'
    )


def _check_activation(
  path: str, activation: QuantSpec, per_tensor: bool
) -> None:
  if activation.group_size is not None:
    raise ValueError(f'Rule {path!r}: group_size is for weights.')
  wanted = 0 if activation.dynamic and not per_tensor else None
  if activation.axis != wanted:
    kind = 'dynamic' if activation.dynamic else 'static'
    scales = 'tensor' if per_tensor else 'channel'
    raise ValueError(
      f'Rule {path!r}: with weights per {scales} Qwix has {kind} ranges of '
      f'axis={wanted}, not axis={activation.axis}.'
    )


def _calibration(path: str, spec: QuantSpec) -> str:
  if not spec.symmetric and spec.narrow:
    raise ValueError(
      f'Rule {path!r}: an affine range of Qwix uses all codes; set '
      'narrow=False.'
    )
  if not spec.symmetric:
    return 'minmax'
  return _narrow(spec.bits) if spec.narrow else 'absmax'


def _narrow(bits: int) -> str:
  """The calibration for which Qwix's step is max|x| / qmax."""
  qmax = QuantSpec(bits).qmax
  return f'absmax,{(qmax + 0.5) / qmax!r}'


def _specs(rule: Any) -> tuple[QuantSpec | None, QuantSpec | None]:
  """What quantizes the weights and the inputs of a rule's modules."""
  if rule.weight_qtype is None:
    return None, None
  per_tensor = getattr(rule, 'disable_channelwise_axes', False)
  translated = {
    *('module_path', 'weight_qtype', 'act_qtype', 'tile_size'),
    *('act_static_scale', 'weight_calibration_method'),
    *('act_calibration_method', 'disable_channelwise_axes'),
  }
  for field in dataclasses.fields(rule):
    value = getattr(rule, field.name)
    whole_batch = field.name == 'additional_qt_config' and value == _WHOLE_BATCH
    if not (
      field.name in translated or whole_batch or _equal(value, field.default)
    ):
      raise _unknown(rule, field.name)
  size = rule.tile_size
  grouped = size is not None
  if grouped and (not isinstance(size, int) or per_tensor or rule.act_qtype):
    raise _unknown(rule, 'tile_size')
  weight = QuantSpec(
    **_read(rule, 'weight'),
    axis=None if per_tensor else -1,
    group_size=size,
  )
  if not weight.symmetric:
    raise _unknown(rule, 'weight_calibration_method')
  if rule.act_qtype is None:
    return weight, None
  dynamic = not rule.act_static_scale
  return weight, QuantSpec(
    **_read(rule, 'act'),
    axis=0 if dynamic and not per_tensor else None,
    dynamic=dynamic,
  )


def _equal(value: Any, default: Any) -> bool:
  sequences = isinstance(value, (list, tuple)) and isinstance(default, tuple)
  return tuple(value) == default if sequences else value == default


def _read(rule: Any, kind: str) -> Mapping[str, Any]:
  """Bits, symmetry and narrowness of the weights or the activations."""
  name = f'{kind}_qtype'
  qtype = getattr(rule, name)
  qtype = qtype if isinstance(qtype, str) else jnp.dtype(qtype).name
  bits = {v: k for k, v in _TYPES.items()}.get(qtype)
  if bits is None:
    raise _unknown(rule, name)
  name = f'{kind}_calibration_method'
  method = getattr(rule, name) or 'absmax'
  kinds = {
    'absmax': {'symmetric': True, 'narrow': False},
    'minmax': {'symmetric': False, 'narrow': False},
    _narrow(bits): {'symmetric': True, 'narrow': True},
  }
  if method not in kinds:
    raise _unknown(rule, name)
  return {'bits': bits, **kinds[method]}


def _unknown(rule: Any, field: str) -> ValueError:
  return ValueError(
    f'Rule {rule.module_path!r}: {field}={getattr(rule, field)!r} has no '
    'counterpart in QuantSpec.'
  )
