"""Which schemes of `config.distill.scheme` go together.

Owns the refusals; what a scheme makes of a training is `distillation`'s.
"""

import ml_collections


def check(scheme: ml_collections.ConfigDict) -> None:
  """Refuses schemes that do not go together.

  Args:
    scheme: `config.distill.scheme`.

  Raises:
    ValueError: for a cohort with `reuse_head` or `ema`, `ema` with others in
      the chain, who would teach nobody, or `reuse_head` with assistants.

  Example:
    >>> from kd_jax import defaults
    >>> scheme = defaults.get_config().distill.scheme
    >>> check(scheme)
    >>> scheme.ema, scheme.generations = 0.99, 2
    >>> check(scheme)
    Traceback (most recent call last):
    ...
    ValueError: distill.scheme.ema teaches by the student's own average: it \
needs distill.scheme.generations=1, not 2.
  """
  if scheme.reuse_head:
    what = 'reuse_head gives one student the head of its teacher'
    _needs(scheme, what, cohort=1, assistants={})
  if scheme.ema:
    what = "ema teaches by the student's own average"
    _needs(scheme, what, cohort=1, generations=1, assistants={})


def _needs(
  scheme: ml_collections.ConfigDict, what: str, **fields: object
) -> None:
  values = scheme.to_dict()
  for field, value in fields.items():
    if values[field] != value:
      raise ValueError(
        f'distill.scheme.{what}: it needs distill.scheme.{field}={value}, not '
        f'{values[field]}.'
      )
