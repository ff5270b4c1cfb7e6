"""Two functions of a batch, compared by their outputs.

Owns the numbers, and how many examples have to agree. Knows no layers: those
are in `layers`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from kd_jax.types import ATTENTION_MASK, Batch, check_same_shape

# `(found, expected)`, float64 `[B, ..., C]` -> bool `[B, ...]`
Agree = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Parity(NamedTuple):
  """What `compare` found; numbers over all examples, padding left out.

  Attributes:
    agreement: share of predictions that agree, such as examples with the same
      most likely class; one with a NaN in either output disagrees.
    max_abs_error: the largest difference of any output; NaN if one is NaN.
    sqnr_db: signal-to-quantization-noise ratio in decibels,
      10 log10(sum reference^2 / sum (reference - output)^2); inf when equal.
    examples: how many examples were compared.
  """

  agreement: float
  max_abs_error: float
  sqnr_db: float
  examples: int


def most_likely(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
  """Whether the most likely classes of two outputs are the same.

  Args:
    found: `[..., C]` of any real dtype; of equal entries the first counts.
    expected: likewise.

  Returns:
    bool `[...]`.

  Example:
    >>> found = np.array([[0.1, 0.9], [0.6, 0.4]])
    >>> expected = np.array([[0.4, 0.6], [0.0, 1.0]])
    >>> most_likely(found, expected).tolist()
    [True, False]
  """
  return found.argmax(-1) == expected.argmax(-1)


def within(tolerance: float) -> Agree:
  """Whether no output of `[..., D]` differs by more.

  Args:
    tolerance: the largest difference that still agrees, in the output's unit;
      0 asks for equality.

  Returns:
    `(found, expected) -> bool [...]`, for `compare`. NaN never agrees.

  Example:
    >>> found, expected = np.array([[1.0], [2.0]]), np.array([[1.05], [3.0]])
    >>> within(0.1)(found, expected).tolist()
    [True, False]
  """
  return lambda found, expected: (
    np.abs(found - expected).max(-1, initial=0.0) <= tolerance
  )


def compare(
  fn: Callable[[Any], Any],
  reference: Callable[[Any], Any],
  batches: Iterable[Batch],
  *,
  agree: Agree = most_likely,
  reads: str = '',
) -> Parity:
  """Compares two functions on the same batches.

  Sums are taken in float64 on the host and divided once, so that batches of
  different sizes count by their examples.

  Args:
    fn: `batch -> [B, ...]` outputs, such as logits `[B, C]`, any real dtype.
    reference: likewise, what `fn` should compute.
    batches: each may hold `mask`, `[B]`, and of outputs `[B, L, V]`
      `attention_mask`, `[B, L]`: 0 for padding, which is ignored whatever its
      outputs.
    agree: when two predictions are the same; `within` is for outputs that are
      no classes.
    reads: the entry of a batch that both functions take; '' for all of it.

  Returns:
    The numbers.

  Raises:
    ValueError: if the outputs have no two axes, a mask has another shape, or
      there is no example.

  Example:
    >>> logits = np.array([[2.0, 0.0], [0.0, 1.0], [7.0, 9.0]])
    >>> batch = {'logits': logits, 'mask': np.array([1, 1, 0])}
    >>> parity = compare(
    ...   lambda batch: batch['logits'] + np.array([0.0, 0.5]),
    ...   lambda batch: batch['logits'],
    ...   [batch],
    ... )
    >>> parity.agreement, parity.max_abs_error
    (1.0, 0.5)
    >>> f'{parity.sqnr_db:.2f} dB, {parity.examples} examples'
    '10.00 dB, 2 examples'
  """
  examples = agreed = predictions = 0
  largest = np.float64(0.0)
  signal = noise = 0.0
  for batch in batches:
    inputs = batch[reads] if reads else batch
    found, expected, counts = _outputs(fn(inputs), reference(inputs), batch)
    examples += len(found)
    nan = np.isnan(found).any(-1) | np.isnan(expected).any(-1)
    agreed += int(np.sum(agree(found, expected) & ~nan & counts))
    predictions += int(counts.sum())
    found, expected = found[counts], expected[counts]
    with np.errstate(invalid='ignore'):
      difference = np.abs(found - expected)
    # Two infinities of one sign are equal, though their difference is NaN.
    difference = np.where(found == expected, 0.0, difference)
    # np.maximum keeps a NaN; max() may drop it.
    largest = np.maximum(largest, difference.max(initial=0.0))
    noise += float(np.square(difference).sum())
    signal += float(np.square(expected).sum())
  if not predictions:
    raise ValueError('compare: there is no example to compare on.')
  return Parity(
    agreement=agreed / predictions,
    max_abs_error=float(largest),
    sqnr_db=decibels(signal, noise),
    examples=examples,
  )


def require(parity: Parity, *, name: str, agreement: float = 0.995) -> None:
  """Raises ValueError if two forms of a model agree on too few examples.

  Args:
    parity: what `compare` returned.
    name: what was compared; begins the message.
    agreement: the share of predictions to agree on, at least.

  Raises:
    ValueError: with the share, the largest error and the decibels.

  Example:
    >>> require(Parity(0.98, 0.7, 21.4, 500), name='integer (ONNX)')
    Traceback (most recent call last):
    ...
    ValueError: integer (ONNX) agrees with its reference on 98.00% of 500 \
examples, but 99.50% are required; largest error 0.7, SQNR 21.4 dB.
  """
  if parity.agreement >= agreement:
    return
  raise ValueError(
    f'{name} agrees with its reference on {parity.agreement:.2%} of '
    f'{parity.examples} examples, but {agreement:.2%} are required; largest '
    f'error {parity.max_abs_error:.3g}, SQNR {parity.sqnr_db:.1f} dB.'
  )


def _outputs(
  found: Any, expected: Any, batch: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Both outputs of the examples that are not padding, float64.

  And which of their predictions `[B, ...]` count: no token that only pads.
  """
  found, expected = np.asarray(found), np.asarray(expected)
  check_same_shape('compare', fn=found, reference=expected)
  if found.ndim < 2:
    raise ValueError(
      f'compare: outputs must be [B, ..., C] but have shape {found.shape}.'
    )
  mask = np.asarray(batch.get('mask', np.ones(len(found))))
  if mask.shape != found.shape[:1]:
    raise ValueError(
      f'compare: mask has shape {mask.shape} but outputs have {found.shape}.'
    )
  real = mask > 0
  counts = np.ones(found.shape[:-1], bool)
  if ATTENTION_MASK in batch and counts.ndim > 1:
    tokens = np.asarray(batch[ATTENTION_MASK])
    check_same_shape('compare', attention_mask=tokens, predictions=counts)
    counts = tokens != 0
  found, expected = (x[real].astype(np.float64) for x in (found, expected))
  return found, expected, counts[real]


def decibels(signal: float, noise: float) -> float:
  """Signal-to-noise ratio of two sums of squares; inf without noise.

  Example:
    >>> round(decibels(100.0, 1.0), 4), decibels(1.0, 0.0), decibels(0.0, 1.0)
    (20.0, inf, -inf)
  """
  if noise == 0:
    return math.inf
  if signal == 0:
    return -math.inf
  return 10 * (math.log10(signal) - math.log10(noise))
