"""SIGTERM and SIGINT: how a run that is asked to stop does so.

Owns the handlers of both signals, and what is raised. Outside of the training
loop a signal ends the work where it is, in any loop of any stage: files are
written whole or not at all, and a stage that is not finished starts again or
goes on. The training loop holds signals back until its state is saved. Owns
nothing of what is saved.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

# EX_TEMPFAIL, the exit code of a run that wants to be started again.
REQUEUE = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preempted(BaseException):
  """SIGTERM or SIGINT arrived; what could be saved was saved before.

  Like KeyboardInterrupt no Exception, lest a handler of errors swallow it. The
  command line ends with `REQUEUE`, 75, after it.

  Example:
    >>> issubclass(Preempted, Exception)
    False
  """


class Deferred:
  """A signal that is held back; made by `deferred`."""

  def __init__(self):
    self._received: int | None = None
    self._raises = False

  def is_set(self) -> bool:
    """Whether a signal came."""
    return self._received is not None

  @contextlib.contextmanager
  def raised(self) -> Iterator[None]:
    """A signal raises Preempted within, also one that came before."""
    self._raises = True
    try:
      if self._received is not None:
        raise _preempted(self._received)
      yield
    finally:
      self._raises = False

  def _receive(self, signum: int) -> None:
    first = not self.is_set()
    self._received = signum
    if first and self._raises:
      raise _preempted(signum)


@contextlib.contextmanager
def deferred() -> Iterator[Deferred]:
  """Holds SIGTERM and SIGINT back; a second SIGINT does what it did before.

  A signal that nobody asked about is sent again at the end, to whoever handled
  it before. Not in the main thread, where Python can set no handler, signals
  go on as they did.

  Example:
    >>> try:
    ...   with deferred() as stop:
    ...     signal.raise_signal(signal.SIGINT)
    ...     assert stop.is_set()
    ...     raise Preempted('saved')
    ... except Preempted as e:
    ...   print(e)
    saved
  """
  stop = Deferred()
  poll()
  with _handled(stop._receive):
    yield stop
  if stop._received is not None:
    signal.raise_signal(stop._received)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
  """Sends SIGTERM and SIGINT that come within again at the end.

  For what must not be broken off, and for event loops: asyncio prints and drops
  an exception of a callback, and then waits for ever.

  Example:
    >>> with stoppable():
    ...   try:
    ...     with uninterrupted():
    ...       signal.raise_signal(signal.SIGTERM)
    ...       print('read')
    ...   except Preempted as e:
    ...     print(e)
    read
    stopped by SIGTERM.
  """
  stop = Deferred()
  try:
    with _handled(stop._receive):
      yield
  finally:
    if stop._received is not None:
      signal.raise_signal(stop._received)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
  """SIGTERM and SIGINT raise Preempted; SIGINT after one of them kills.

  At the end the handlers are those from before. In another thread than the
  main one nothing changes.

  Raises:
    Preempted: within, wherever the code is when the signal comes.

  Example:
    >>> with stoppable():
    ...   try:
    ...     signal.raise_signal(signal.SIGTERM)
    ...   except Preempted as e:
    ...     print(e)
    stopped by SIGTERM.
  """

  def receive(signum: int) -> None:
    raise _preempted(signum)

  with _handled(receive, again=signal.SIG_DFL):
    yield


def poll() -> None:
  """Raises Preempted if a signal came that `stoppable` raised in vain.

  An exception in a destructor or a callback of the garbage collector is
  printed and dropped by Python.

  Raises:
    Preempted: as long as `stoppable` is around this and a signal came.
  """
  handler = signal.getsignal(signal.SIGTERM)
  if isinstance(handler, _Handler) and handler.received is not None:
    raise _preempted(handler.received)


# What `signal.signal` takes and returns.
_Known = Callable[[int, FrameType | None], Any] | int | None


class _Handler:
  """Handles the first signal; then leaves SIGINT to `again`."""

  def __init__(self, act: Callable[[int], None], again: _Known):
    self.act, self.again = act, again
    self.received: int | None = None

  def __call__(self, signum: int, frame: FrameType | None) -> None:
    first = self.received is None
    self.received = signum
    signal.signal(signal.SIGINT, self.again)
    # A second SIGTERM must not end what the first has begun.
    if first:
      self.act(signum)


@contextlib.contextmanager
def _handled(
  act: Callable[[int], None], again: _Known = None
) -> Iterator[None]:
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = {s: signal.getsignal(s) for s in SIGNALS}
  interrupt = before[signal.SIGINT]
  if again is None:
    again = getattr(interrupt, 'again', interrupt)
  handler = _Handler(act, again)
  for s in SIGNALS:
    signal.signal(s, handler)
  try:
    yield
  finally:
    for s, old in before.items():
      # None is a handler that Python did not set, and cannot set again.
      signal.signal(s, signal.SIG_DFL if old is None else old)


def _preempted(signum: int) -> Preempted:
  return Preempted(f'stopped by {signal.Signals(signum).name}.')
