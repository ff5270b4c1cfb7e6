"""Terms by name: from the words of a configuration to an objective.

`TERMS` names every term that a configuration may use, and `PLACES` where in a
network a term reads unless it is told otherwise. Owns no formula and no weight;
published methods as such words are in `methods`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kd_jax import losses, objectives, rules
from kd_jax.objectives import Objective, base
from kd_jax.types import names_of


class Kept(NamedTuple):
  """What a cache keeps of a teacher.

  Attributes:
    features: the taps.
    top_k: how many of the largest outputs; 0 for all.
    temperature: at which the others' total probability is kept.
  """

  features: tuple[str, ...] = ()
  top_k: int = 0
  temperature: float = 1.0


class Facts(NamedTuple):
  """What a term may need to know besides its own options.

  Attributes:
    student: the student's `models.layers.Taps`.
    teacher: the teacher's; None without one; of several teachers whose losses
      are averaged, name -> taps.
    num_classes: C.
    total_steps: of the run, for schedules in shares of it.
    labels: `[N]` class of every training example by id, -1 for other ids.
    teacher_weights: of several teachers; equal when None.
    kept: of a teacher that is read from a cache; None for a live one.
  """

  student: Any
  teacher: Any
  num_classes: int
  total_steps: int
  labels: np.ndarray | None = None
  teacher_weights: Mapping[str, float] | None = None
  kept: Kept | None = None


class Term(NamedTuple):
  """A term of a configuration.

  Attributes:
    make: `(**options) -> Objective`.
    reads: where it reads by default, one of `PLACES`; None for outputs only.
    needs: options that are filled in from `Facts` by name.
    teacher: whether it learns from a teacher.
    asks: for what: LOGITS, LIKELIEST (the likeliest classes alone, with its
      default options), FEATURES, or RUNS, to run it on other inputs; None for
      what `reads` implies.
  """

  make: Callable[..., Objective]
  reads: str | None = None
  needs: tuple[str, ...] = ()
  teacher: bool = True
  asks: str | None = None


LOGITS, LIKELIEST, FEATURES, RUNS = 'logits', 'likeliest', 'features', 'runs'


def _outputs(
  loss: Callable[..., Any], asks: str = LOGITS, **bound: Any
) -> Term:
  make = functools.partial(objectives.on_outputs, loss, **bound)
  return Term(make, asks=asks)


def _features(loss: Callable[..., Any], reads: str, **bound: Any) -> Term:
  make = functools.partial(objectives.on_features, loss, **bound)
  return Term(make, reads)


def _batch(loss: Callable[..., Any], reads: str | None = None) -> Term:
  return Term(functools.partial(objectives.on_batch, loss), reads)


def _tokens(loss: Callable[..., Any], **bound: Any) -> Term:
  make = functools.partial(objectives.on_tokens, loss, **bound)
  return Term(make, asks=FEATURES)


TERMS: dict[str, Term] = {
  'soft_targets': Term(objectives.soft_targets),
  'hard_labels': Term(objectives.hard_labels, teacher=False),
  'regression': Term(objectives.regression, teacher=False),
  'logit_matching': Term(
    functools.partial(objectives.regression, to='teacher')
  ),
  'decoupled_kd': _outputs(losses.decoupled_kd, with_label=True),
  'normalized_kd': _outputs(losses.normalized_kd, with_label=True),
  'reverse_kl': _outputs(losses.reverse_kl_divergence),
  'jensen_shannon': _outputs(losses.jensen_shannon),
  'skew_kl': _outputs(losses.skew_kl_divergence),
  'hard_distillation': _outputs(losses.hard_distillation, LIKELIEST),
  'teacher_free': Term(objectives.teacher_free, teacher=False),
  'top_k': Term(objectives.top_k_targets, asks=LIKELIEST),
  'distillation_token': Term(objectives.distillation_token, asks=LIKELIEST),
  'dist': _batch(losses.dist),
  'multi_level': _batch(losses.multi_level),
  'hints': Term(objectives.hints, 'hint'),
  'features': _features(losses.hint, 'last'),
  'attention_transfer': _features(losses.attention_transfer, 'stages'),
  'neuron_selectivity': _features(losses.neuron_selectivity, 'last'),
  'flow': Term(objectives.flow, 'stages'),
  'variational_information': Term(objectives.variational_information, 'stages'),
  'activation_boundary': Term(objectives.activation_boundary, 'preactivations'),
  'overhaul': Term(objectives.overhaul, 'preactivations', ('norms',)),
  'factor_transfer': Term(objectives.factor_transfer, 'last'),
  'review': Term(objectives.review, 'stages'),
  'masked_generation': Term(objectives.masked_generation, 'last'),
  'softmax_regression': Term(
    objectives.softmax_regression, 'last', ('head',), asks=LOGITS
  ),
  'class_attention': Term(
    objectives.class_attention, 'last', ('student_head', 'teacher_head')
  ),
  'norm_direction': Term(
    objectives.norm_direction, 'embedding', ('num_classes',)
  ),
  'self_distillation': Term(
    objectives.self_distillation,
    'own_stages',
    ('deepest', 'num_classes'),
    teacher=False,
  ),
  'relational': Term(objectives.relational, 'embedding'),
  'similarity_preserving': _batch(losses.similarity_preserving, 'last'),
  'probabilistic_transfer': _batch(losses.probabilistic_transfer, 'embedding'),
  'correlation_congruence': Term(
    objectives.correlation_congruence, 'embedding'
  ),
  'contrastive': Term(objectives.contrastive, 'embedding', ('labels',)),
  'input_gradients': Term(objectives.input_gradients, asks=RUNS),
  'sobolev': Term(objectives.sobolev, asks=RUNS),
  'jacobians': Term(objectives.jacobians, asks=RUNS),
  'hidden_states': _tokens(losses.hidden_squared_error, project=True),
  'hidden_cosine': _tokens(losses.hidden_cosine, project=True),
  'attention_maps': _tokens(losses.attention_squared_error, power=2),
  'attention_cross_entropy': _tokens(losses.attention_cross_entropy),
  'token_relations': _tokens(losses.minilm_relation),
  'patient': Term(objectives.patient, asks=FEATURES),
}


def _paired(
  student: Sequence[str], teacher: Sequence[str]
) -> tuple[Sequence[str], Sequence[str]]:
  """The deepest stages of both, as many as the shallower network has."""
  count = min(len(student), len(teacher))
  return student[len(student) - count :], teacher[len(teacher) - count :]


def _middle(student: Sequence[str], teacher: Sequence[str]) -> tuple[str, str]:
  s, t = _paired(student, teacher)
  return s[(len(s) - 1) // 2], t[(len(t) - 1) // 2]


# place -> (facts) -> (student taps, teacher taps); the words of `Term.reads`.
PLACES: dict[str, Callable[[Facts], tuple[Any, Any]]] = {
  'stages': lambda f: _paired(f.student.stages, f.teacher.stages),
  'preactivations': lambda f: _paired(
    f.student.preactivations, f.teacher.preactivations
  ),
  'hint': lambda f: _middle(f.student.stages, f.teacher.stages),
  'last': lambda f: (f.student.stages[-1], f.teacher.stages[-1]),
  'embedding': lambda f: (f.student.embedding, f.teacher.embedding),
}


def _needed(name: str, facts: Facts, reads: Mapping[str, Any]) -> Any:
  if name == 'norms':
    return _paired(reads['student'], facts.teacher.norms)[1]
  return {
    'num_classes': facts.num_classes,
    'labels': facts.labels,
    'head': facts.teacher and facts.teacher.head,
    'student_head': facts.student.head,
    'teacher_head': facts.teacher and facts.teacher.head,
    'deepest': facts.student.embedding,
  }[name]


def make_term(name: str, facts: Facts, **options: Any) -> Objective:
  """A term by name.

  Args:
    name: one of `TERMS`.
    facts: about the networks and the data.
    **options: of the term; `student` and `teacher` name other taps than the
      default ones; a mapping is a schedule, see `make_value`.

  Raises:
    ValueError: for an unknown name or option, a temperature of 0 or no teacher.

  Example:
    >>> facts = Facts(student=None, teacher=None, num_classes=10, total_steps=9)
    >>> make_term('soft_target', facts)
    Traceback (most recent call last):
    ValueError: Unknown term 'soft_target': did you mean soft_targets?
  """
  kind = rules.choose('term', name, TERMS)
  if kind.teacher and isinstance(facts.teacher, Mapping):
    own = {
      member: make_term(name, facts._replace(teacher=taps), **options)
      for member, taps in facts.teacher.items()
    }
    return objectives.each_teacher(own, weights=facts.teacher_weights)
  base.check_temperature(name, options.get('temperature', 1.0))
  options = {k: make_value(v, facts.total_steps) for k, v in options.items()}
  if kind.reads == 'own_stages':
    options.setdefault('student', facts.student.stages[:-1])
  elif kind.reads is not None:
    if facts.teacher is None:
      raise ValueError(f'The term {name!r} needs a teacher.')
    student, teacher = PLACES[kind.reads](facts)
    options.setdefault('student', student)
    options.setdefault('teacher', teacher)
  for need in kind.needs:
    if need not in options:
      options[need] = _needed(need, facts, options)
  try:
    return kind.make(**options)
  except TypeError as e:
    raise ValueError(f'Term {name!r}: {e}.') from e


def make_value(value: Any, total_steps: int) -> Any:
  """A number as it is; a mapping as a schedule over shares of the run.

  Args:
    value: anything, or a mapping: the words of `objectives.schedule`, where
      `begin` and `until` are shares of the run.
    total_steps: length of the run.

  Raises:
    ValueError: for a mapping that is no schedule or leaves the run.

  Example:
    >>> warm = make_value({'end': 2.0, 'until': 0.1}, total_steps=100)
    >>> float(warm(5)), float(warm(50))
    (1.0, 2.0)
  """
  if not isinstance(value, Mapping):
    return value
  at = {k: value[k] for k in ('begin', 'until') if k in value}
  if not all(isinstance(v, int | float) and 0 <= v <= 1 for v in at.values()):
    raise ValueError(f'{at} are no shares of the run, in [0, 1].')
  at = {k: round(share * total_steps) for k, share in at.items()}
  try:
    return objectives.schedule(**{**value, **at})
  except TypeError as e:
    raise ValueError(f'{dict(value)} is no schedule: {e}.') from e


def make_objective(
  terms: Mapping[str, Mapping[str, Any]], facts: Facts
) -> Objective:
  """A weighted sum of terms, from words.

  Args:
    terms: label -> `{'name': one of TERMS, 'weight': number or schedule,
      **options}`. A term whose weight is 0 is left out.
    facts: about the networks and the data.

  Raises:
    ValueError: for a term without name or weight, or if none is left.

  Example:
    >>> facts = Facts(student=None, teacher=None, num_classes=10, total_steps=9)
    >>> objective = make_objective({
    ...   'half': {'name': 'hard_labels', 'weight': 0.5},
    ...   'none': {'name': 'soft_targets', 'weight': 0},
    ... }, facts)
    >>> import jax
    >>> inputs = base.Inputs(None, None, {}, np.int32(0), jax.random.key(0))
    >>> objective.init(inputs)
    ({'half': {}}, {'half': {}})
  """
  made = {}
  for label, term in terms.items():
    options = dict(term)
    if missing := {'name', 'weight'} - set(options):
      raise ValueError(f'The term {label!r} has no {min(missing)!r}.')
    name, weight = options.pop('name'), options.pop('weight')
    if isinstance(weight, Mapping) or weight:
      objective = make_term(name, facts, **options)
      learns = TERMS[name].teacher or options.get('to') == 'teacher'
      if facts.kept is not None and learns:
        _check_kept(label, name, options, objective, facts.kept, facts.teacher)
      made[label] = (make_value(weight, facts.total_steps), objective)
  return objectives.weighted_sum(made)


def _check_kept(
  label: str,
  name: str,
  options: Mapping[str, Any],
  objective: Objective,
  kept: Kept,
  teacher: Any,
) -> None:
  """Raises ValueError if a cache lacks what a term asks of its teacher."""
  what = f'The term {label!r} ({name})'
  asks = TERMS[name].asks or (FEATURES if TERMS[name].reads else LOGITS)
  if asks == RUNS:
    raise ValueError(
      f'{what} runs the teacher on inputs of its own, which no cache holds: '
      'train with the live teacher.'
    )
  taps = objective.taps.teacher
  if isinstance(teacher, Mapping):
    # The losses of several teachers, each with outputs of its own.
    taps = (*taps, *(f'{m}/{base.OUTPUT}' for m in teacher))
  missing = [tap for tap in taps if tap not in kept.features]
  if missing:
    raise ValueError(
      f'{what} reads {", ".join(missing)} of the teacher, which the cache does '
      'not hold: make it with --features.'
    )
  if not kept.top_k:
    return
  if asks == LIKELIEST:
    _check_top(what, name, options, kept)
  elif asks == LOGITS or base.OUTPUT in names_of(options.get('teacher', ())):
    raise ValueError(
      f'{what} reads all outputs of the teacher, but the cache holds the '
      f'{kept.top_k} largest: make it without --top_k, or use the term top_k '
      'or hard_distillation.'
    )


def _check_top(
  what: str, name: str, options: Mapping[str, Any], kept: Kept
) -> None:
  if name == 'distillation_token' and not options.get('hard', True):
    raise ValueError(
      f'{what} with hard=False reads all outputs of the teacher, but the cache '
      f'holds the {kept.top_k} largest: make it without --top_k.'
    )
  if name != 'top_k':
    return
  if options.get('k', 0) > kept.top_k:
    raise ValueError(
      f'{what} has k={options["k"]}, but the cache holds the {kept.top_k} '
      'largest outputs.'
    )
  temperature = options.get('temperature', 1.0)
  if options.get('tail') == 'uniform' and temperature != kept.temperature:
    raise ValueError(
      f"{what} with tail='uniform' has the temperature {temperature}, but the "
      f'cache was made for {kept.temperature}.'
    )


def describe(terms: Mapping[str, Mapping[str, Any]]) -> str:
  """The terms of a configuration as one line, without those of weight 0.

  Example:
    >>> describe({
    ...   'kd': {'name': 'soft_targets', 'weight': 0.1 * 0.9},
    ...   'ce': {'name': 'hard_labels', 'weight': 1, 'label_smoothing': 0.1},
    ... })
    '0.09 x soft_targets + 1 x hard_labels(label_smoothing=0.1)'
  """
  return ' + '.join(
    _described(**term) for term in terms.values() if term['weight']
  )


def _described(name: str, weight: Any, **options: Any) -> str:
  inside = ', '.join(f'{k}={_word(v)}' for k, v in options.items())
  return f'{_word(weight)} x {name}' + (f'({inside})' if inside else '')


def _word(value: Any) -> str:
  if isinstance(value, float):
    # 0.1 * 0.9, which is 0.09000000000000001, reads 0.09.
    return f'{float(f"{value:.6g}")}'
  if not isinstance(value, Mapping):
    return f'{value}'
  start, shape = value.get('start', 0.0), value.get('shape', 'linear')
  return f'{start}..{value["end"]} ({shape} until {value["until"]:.3g})'
