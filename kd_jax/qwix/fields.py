"""What quantizes a module: our `QuantSpec`s as fields of Qwix's, and back.

Owns what neither side can express of the other, and says so by name. Which
modules a rule reaches is in `patterns`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from kd_jax.quantize import QuantSpec

_TYPES = {8: 'int8', 4: 'int4'}
# A range per tensor in dense layers too, where Qwix would have one per row.
_WHOLE_BATCH = {'lhs_disable_channelwise_axes': True}


def of_specs(
  path: str,
  weight: QuantSpec,
  activation: QuantSpec | None,
  options: Mapping[str, Any],
) -> dict[str, Any]:
  """The fields of a rule from what quantizes its weights and inputs.

  Raises:
    ValueError: for gradients in a format that needs other activations.
  """
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


def specs_of(rule: Any) -> tuple[QuantSpec | None, QuantSpec | None]:
  """What quantizes the weights and the inputs of a rule's modules.

  Raises:
    ValueError: for a rule that our specs cannot say.
  """
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


def _narrow(bits: int) -> str:
  """The calibration for which Qwix's step is max|x| / qmax."""
  qmax = QuantSpec(bits).qmax
  return f'absmax,{(qmax + 0.5) / qmax!r}'
