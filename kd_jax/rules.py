"""Rules that address parameters and layers by path; first match wins.

Owns paths, matching, and what is said of a word that is not known; not what a
rule is for. A path is the '/'-joined name of a leaf or layer, such as
'stage1/conv/kernel'. A rule is a pair `(pattern, value)`: the pattern is
matched with `re.fullmatch`, and `None` as value leaves the path out.
Quantization, pruning and weight decay all choose their parameters here, and
nowhere else.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax

T = TypeVar('T')
Rules = Sequence[tuple[str, T | None]]


def path_name(path: Any) -> str:
  """The '/'-joined name of a key path of `jax.tree_util`.

  Args:
    path: a tuple of keys. Indices and names of fields are joined as they are,
      so that a tuple's second entry is '1'.

  Example:
    >>> tree = {'conv': {'kernel': 1.0}}
    >>> [(path, _)] = jax.tree_util.tree_leaves_with_path(tree)
    >>> path_name(path)
    'conv/kernel'
  """
  return jax.tree_util.keystr(path, simple=True, separator='/')


def leaf_names(tree: Any) -> list[str]:
  """The path of every leaf, in the order of `jax.tree.leaves`.

  Args:
    tree: any pytree.

  Example:
    >>> leaf_names({'conv': {'kernel': 1.0, 'bias': 0.5}})
    ['conv/bias', 'conv/kernel']
  """
  return [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)]


def named_leaves(tree: Any) -> dict[str, Any]:
  """path -> leaf, in the order of `jax.tree.leaves`.

  Args:
    tree: any pytree.

  Example:
    >>> named_leaves({'conv': {'kernel': 1.0, 'bias': 0.5}})
    {'conv/bias': 0.5, 'conv/kernel': 1.0}
  """
  return dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))


def near_misses(name: str, choices: Iterable[str], count: int = 12) -> str:
  """A sentence fragment naming the choices closest to `name`.

  Args:
    name: what was asked for.
    choices: what there is, in the order in which it is said.
    count: how many are said at most.

  Returns:
    Up to three close choices, and all of them where they are at most `count`;
    without a close one the first `count`.

  Example:
    >>> near_misses('adan', ['adam', 'sgd'])
    'did you mean adam? (valid: adam, sgd)'
  """
  choices = list(map(str, choices))
  close = difflib.get_close_matches(str(name), choices, n=3, cutoff=0.5)
  shown = ', '.join(choices[:count]) + (', ...' if len(choices) > count else '')
  if not close:
    return f'valid: {shown}' if choices else 'there are none'
  if len(choices) <= count:
    return f'did you mean {" or ".join(close)}? (valid: {shown})'
  return f'did you mean {" or ".join(close)}?'


def choose(kind: str, name: str, choices: Mapping[str, T]) -> T:
  """`choices[name]`, or a ValueError that names the valid ones.

  Args:
    kind: what is chosen, in words; begins the message.
    name: of the choice.
    choices: name -> value.

  Raises:
    ValueError: for a name that is not among them.

  Example:
    >>> choose('optimizer', 'adan', {'adam': 1, 'sgd': 2})
    Traceback (most recent call last):
    ...
    ValueError: Unknown optimizer 'adan': did you mean adam? (valid: adam, sgd)
  """
  if name not in choices:
    raise ValueError(f'Unknown {kind} {name!r}: {near_misses(name, choices)}')
  return choices[name]


def check_pairs(rules: Any, kind: str = 'rule') -> None:
  """Raises ValueError unless rules are `(pattern, value)` pairs.

  Args:
    rules: what was given.
    kind: what they are for; begins the message.

  Raises:
    ValueError: for a string, a mapping, or an entry that is no such pair.

  Example:
    >>> check_pairs('.*/kernel')
    Traceback (most recent call last):
    ValueError: A rule is a pair of a pattern and a value, as in \
[('.*/kernel', ...)]; given was '.*/kernel'.
  """
  if isinstance(rules, str | Mapping) or not all(
    isinstance(pair, tuple | list)
    and len(pair) == 2
    and isinstance(pair[0], str)
    for pair in rules
  ):
    raise ValueError(
      f"A {kind} is a pair of a pattern and a value, as in [('.*/kernel', "
      f'...)]; given was {rules!r}.'
    )


def match(
  rules: Rules[T], names: Sequence[str], *, kind: str = 'rule'
) -> dict[str, T]:
  """The value that each path gets: the first rule that matches it whole.

  Args:
    rules: `(pattern, value)` pairs; a value of None excludes the path.
    names: the paths there are.
    kind: what the rules are for; used in the error.

  Returns:
    path -> value for the paths that a rule with a value matched.

  Raises:
    ValueError: if a rule matches no path at all, its pattern is not a regular
      expression, or for what is no sequence of pairs.

  Example:
    >>> rules = [('head/.*', None), ('.*/kernel', 8)]
    >>> match(rules, ['conv/kernel', 'conv/bias', 'head/kernel'])
    {'conv/kernel': 8}
  """
  check_pairs(rules, kind)
  matched: dict[str, T] = {}
  used = [False] * len(rules)
  for name in names:
    for i, (pattern, value) in enumerate(rules):
      if _fullmatch(pattern, name, kind):
        used[i] = True
        if value is not None:
          matched[name] = value
        break
  for i, (pattern, _) in enumerate(rules):
    if not used[i] and not any(_fullmatch(pattern, n, kind) for n in names):
      raise ValueError(
        f'{kind} {pattern!r} matches nothing: {near_misses(pattern, names)}'
      )
  return matched


def first(rules: Rules[T], name: str) -> T | None:
  """The value of the first rule that matches a path whole, or None.

  Unlike `match` it cannot tell a rule that matches nothing anywhere.

  Args:
    rules: `(pattern, value)` pairs; patterns are those of `re.fullmatch`.
    name: '/'-joined path.

  Example:
    >>> rules = [('head/.*', 8), ('.*/kernel', 4)]
    >>> first(rules, 'head/kernel'), first(rules, 'conv/bias')
    (8, None)
  """
  for pattern, value in rules:
    if _fullmatch(pattern, name, 'rule'):
      return value
  return None


def mirrored(name: str, known: Callable[[str], bool]) -> str | None:
  """Which parameter a leaf mirrors, such as a momentum does, by their paths.

  Args:
    name: path of the leaf, usually in the state of an optimizer.
    known: whether a path is that of a parameter, which may look at shapes too.

  Returns:
    The longest end of `name` that is known, or None.

  Example:
    >>> mirrored('0/mu/conv/kernel', {'kernel', 'conv/kernel'}.__contains__)
    'conv/kernel'
  """
  parts = name.split('/')
  ends = ('/'.join(parts[i:]) for i in range(len(parts) + 1))
  return next((end for end in ends if known(end)), None)


def _fullmatch(pattern: str, name: str, kind: str) -> bool:
  try:
    return re.fullmatch(pattern, name) is not None
  except re.error as e:
    raise ValueError(f'{kind} {pattern!r} is no regular expression: {e}') from e
