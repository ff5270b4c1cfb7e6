"""Lists of our rules as lists of Qwix's, and back.

Owns the order of rules and which of them meet; what one says is in `patterns`
and `fields`.
"""

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

from kd_jax import rules as rules_lib
from kd_jax.quantize import QuantSpec
from kd_jax.qwix import fields, patterns


def to_qwix(
  weight_rules: rules_lib.Rules[QuantSpec],
  activation_rules: rules_lib.Rules[QuantSpec] = (),
  **options: Any,
) -> list[Any]:
  """Rules for Qwix that quantize what ours do; `kd_jax.qwix` says what differs.

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
  qwix = import_qwix()
  known = {f.name for f in dataclasses.fields(qwix.QtRule)}
  for name in options:
    rules_lib.choose('option of qwix.QtRule', name, dict.fromkeys(known))
  modules = [
    (module, spec)
    for pattern, spec in weight_rules
    if (module := patterns.module_of(pattern, spec)) is not None
  ]
  for i, (pattern, spec) in enumerate(activation_rules):
    if spec is not None:
      patterns.check_reach(pattern, modules, activation_rules[:i])
  # By pattern: of two rules with the same one the second is never reached.
  made: dict[str, Any] = {}
  for module, weight in modules:
    if weight is None:
      made.setdefault(module, {})
      continue
    for pattern, activation in (*activation_rules, (patterns.EVERYTHING, None)):
      path = patterns.both(module, pattern)
      if path is not None and path not in made:
        made[path] = fields.of_specs(path, weight, activation, options)
      if path == module:
        break
  return [qwix.QtRule(module_path=path, **made[path]) for path in made]


def from_qwix(
  qwix_rules: Sequence[Any],
) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
  """Our rules for what Qwix's quantize; `kd_jax.qwix` says what differs.

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
    weight, activation = fields.specs_of(rule)
    weights.append((f'{group}/kernel' if group else 'kernel', weight))
    activations.append((group, activation))
  return _without_end(weights), _without_end(activations)


def import_qwix() -> Any:
  """The package, or an ImportError that names our extra."""
  try:
    return importlib.import_module('qwix')
  except ImportError as e:
    raise ImportError(
      "kd_jax.qwix needs Qwix: pip install 'kd_jax[qwix]'."
    ) from e


def _without_end(rules: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
  """Without the last rules that leave out what nothing would match."""
  while rules and rules[-1][1] is None:
    rules = rules[:-1]
  return rules
