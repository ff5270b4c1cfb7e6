"""What a report says: its models, its noise, its aims, and a summary in words.

Reads the report, writes sentences. Measures nothing: a gain within the noise
of the test split is called that, and what nobody measured is called unknown.
"""

import math
from collections.abc import Mapping
from typing import Any

from kd_jax.report.looks import quality_of
from kd_jax.report.names import ALONE, DISTILLED, TEACHER
from kd_jax.report.units import DASH, fraction, milliseconds, number, size

Report = Mapping[str, Any]


def summary(report: Report) -> list[str]:
  """What happened, in sentences made from the numbers, flattering or not.

  The first is about the last model measured, which is what would be shipped;
  then come its speed, what distillation gained, and the aims.

  Args:
    report: the report; reads `models`, `aims` and `dropped`, and leaves out
      the sentences for which it has no numbers.

  Returns:
    At least one sentence.

  Example:
    >>> summary({'models': [
    ...   {'name': 'teacher', 'accuracy': 0.99, 'bytes': 1000},
    ...   {'name': 'int8', 'accuracy': 0.97, 'bytes': 100}]})[0]
    "int8 scores 97.0 %, 2.0 points below the teacher's 99.0 %, in 100 B, \
1/10 of the teacher's size."
  """
  sentences = [_result(report), _speed(report), _gain(report)]
  sentences += [_dropped(report), _aims(report)]
  return [s for s in sentences if s]


def models_of(report: Report) -> list[Mapping[str, Any]]:
  """The measured models, in the order in which the pipeline made them."""
  return list(report.get('models') or [])


def find_model(report: Report, name: str) -> Mapping[str, Any]:
  """The model of that name, or an empty one."""
  return next((m for m in models_of(report) if m.get('name') == name), {})


def examples_of(report: Report) -> int | None:
  """How many examples the metrics were measured on, if it was said."""
  value = number((report.get('dataset') or {}).get('test_examples'))
  return int(value) if value and value > 0 else None


def digits_of(report: Report) -> int:
  """Decimals of a percentage that the test split can resolve."""
  return 2 if (examples_of(report) or 0) >= 5000 else 1


def standard_error(report: Report, quality: Any) -> float | None:
  """The sampling error of a share, sqrt(p (1 - p) / n), if n is known."""
  n, p = examples_of(report), number(quality)
  shared = quality_of(report).percent
  if not n or not shared or p is None or not 0 <= p <= 1:
    return None
  return math.sqrt(p * (1 - p) / n)


def batch_sizes(report: Report) -> list[str]:
  """The batch sizes at which any model was timed, smallest first."""
  found = {str(b) for m in models_of(report) for b in m.get('latency') or {}}
  return sorted(
    found, key=lambda b: (number(b) if b.isdigit() else math.inf, b)
  )


def timing(model: Mapping[str, Any], batch: str) -> dict[str, float | None]:
  """Median, low and high of a model at a batch size, None where missing."""
  found = {str(b): t for b, t in (model.get('latency') or {}).items()}
  times = found.get(batch) or {}
  return {k: number(times.get(f'{k}_ms')) for k in ('median', 'low', 'high')}


def aims(report: Report) -> list[tuple[str, str, str]]:
  """For each aim its verdict, its text and the value reached."""
  verdicts = {True: 'met', False: 'not met'}
  return [
    (
      verdicts.get(a.get('met'), 'not measured'),
      str(a.get('text') or DASH),
      DASH if a.get('value') is None else str(a['value']),
    )
    for a in report.get('aims') or []
  ]


def _shipped(report: Report) -> Mapping[str, Any]:
  """The last measured model that is not the teacher."""
  look = quality_of(report)
  measured = [m for m in models_of(report) if m.get('name') != TEACHER]
  measured = [m for m in measured if look.of(m) is not None]
  return measured[-1] if measured else {}


def _result(report: Report) -> str:
  """The sentence about quality and size of what would be shipped."""
  model, teacher = _shipped(report), find_model(report, TEACHER)
  look, digits = quality_of(report), digits_of(report)
  a, b = look.of(model), look.of(teacher)
  if a is None:
    return 'No model but the teacher was measured.'
  text = f'{model.get("name", DASH)} scores {look.written(a, digits)}'
  if b is not None:
    where = 'below' if a < b else 'above'
    text += (
      ', the same as the teacher'
      if a == b
      else f", {look.distance(a - b, digits)} {where} the teacher's "
      f'{look.written(b, digits)}'
    )
  if number(model.get('bytes')):
    text += f', in {size(model["bytes"])}'
    relative = fraction(model['bytes'], teacher.get('bytes'))
    text += f", {relative} of the teacher's size" if relative else ''
  return text + '.'


def _speed(report: Report) -> str:
  """The sentence that compares its latency with the teacher's."""
  model, teacher = _shipped(report), find_model(report, TEACHER)
  for batch in batch_sizes(report):
    a, b = timing(model, batch), timing(teacher, batch)
    if not a['median'] or not b['median']:
      continue
    times = b['median'] / a['median']
    verdict = (
      f'{times:.1f} times as fast'
      if times >= 1.05
      else f'{1 / times:.1f} times as slow'
      if times <= 1 / 1.05
      else 'about as fast'
    )
    overlap = _overlap((a['low'], a['high']), (b['low'], b['high']))
    return (
      f'At batch {batch} its median latency is {milliseconds(a["median"])} ms '
      f'against {milliseconds(b["median"])} ms: {verdict}'
      + (', though the spreads overlap.' if overlap else '.')
    )
  return ''


Spread = tuple[float | None, float | None]


def _overlap(a: Spread, b: Spread) -> bool:
  """Whether two spreads, low and high, meet; False where one is not known."""
  (low_a, high_a), (low_b, high_b) = a, b
  if low_a is None or high_a is None or low_b is None or high_b is None:
    return False
  return low_a <= high_b and low_b <= high_a


def _gain(report: Report) -> str:
  """The sentence on what distillation gained, or that nobody knows."""
  look = quality_of(report)
  distilled = look.of(find_model(report, DISTILLED))
  alone = look.of(find_model(report, ALONE))
  if distilled is None:
    return ''
  if alone is None:
    return (
      'No student was trained without the teacher, so what distillation '
      'gained is unknown.'
    )
  digits, gain = digits_of(report), distilled - alone
  better = gain if look.higher else -gain
  word = 'a gain' if better > 0 else 'a loss' if better else 'a difference'
  text = (
    f'Distilled, the student scores {look.written(distilled, digits)}; trained '
    f'alone, {look.written(alone, digits)}: {word} of '
    f'{look.distance(gain, digits)}'
  )
  own, other = (standard_error(report, p) for p in (distilled, alone))
  if own is None or other is None:
    return text + '.'
  noise = 2 * math.hypot(own, other)
  beside = 'within' if abs(gain) <= noise else 'beyond'
  return (
    f'{text}, {beside} the noise of {examples_of(report)} test examples '
    f'(two standard errors: {100 * noise:.{digits}f} points).'
  )


def _dropped(report: Report) -> str:
  """The sentence on steps that were dropped and losses that jumped."""
  found = []
  for row in report.get('dropped') or []:
    steps = int(number(row.get('steps')) or 0)
    dropped = int(number(row.get('dropped')) or 0)
    spikes = int(number(row.get('spikes')) or 0)
    if dropped:
      found.append(f'{dropped} of {steps} steps of {row.get("name")}')
    if spikes:
      found.append(f'{spikes} spikes in the loss of {row.get("name")}')
  if not found:
    return ''
  return (
    'Not all of the training went well (steps with NaN or infinity are '
    f'dropped): {", ".join(found)}.'
  )


def _aims(report: Report) -> str:
  """The sentence that counts the aims and names those not met."""
  found = aims(report)
  if not found:
    return ''
  met = sum(verdict == 'met' for verdict, _, _ in found)
  text = f'{met} of {len(found)} aims met'
  missed = [f'{t} ({v}: {x})' for v, t, x in found if v != 'met']
  return text + (f'; the others: {"; ".join(missed)}.' if missed else '.')
