"""Models whose products Qwix quantizes.

Owns the choice of a provider; rules are in `translation`, and what the model
computes then is Qwix's.
"""

from collections.abc import Sequence
from typing import Any

from kd_jax import rules as rules_lib
from kd_jax.quantize import QuantSpec
from kd_jax.qwix.translation import import_qwix, to_qwix

PROVIDERS = {'train': 'QtProvider', 'serve': 'PtqProvider'}


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
    weight_rules: `(pattern, spec or None)` pairs on parameter paths, see
      `to_qwix`.
    activation_rules: likewise on layer paths; none by default, so that weights
      alone are quantized.
    provider: 'train' rounds in forward and, with `bwd_qtype`, in backward
      passes of float weights (QAT, quantized training); 'serve' runs on
      integer weights, which `qwix.quantize_params` makes.
    inputs: arguments of the model's call; for nnx modules, which Qwix runs
      once.
    **options: fields of `qwix.QtRule` for all rules, see `to_qwix`.

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
  qwix = import_qwix()
  name = rules_lib.choose('provider', provider, PROVIDERS)
  made = to_qwix(weight_rules, activation_rules, **options)
  for rule in made:
    if provider == 'serve' and rule.disable_channelwise_axes:
      raise ValueError(
        f"Qwix's {name} has a scale for each output channel: {rule.module_path}"
        ' asks for one per tensor.'
      )
  return qwix.quantize_model(model, getattr(qwix, name)(made), *inputs)
