"""SIGTERM and Ctrl-C as a request to save and leave, polled where it is safe to."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED = 0, 1, 42


class Preempted(Exception):
  """The process was asked to stop. Whoever holds state that is worth saving catches this, saves, and exits 42."""


class Preemption:
  """Context manager that turns SIGTERM and SIGINT into a flag. A second signal acts at once, as it would outside.

  agreed: whether to stop here, given whether this process was asked to; for several that must stop at the same place.
  """

  def __init__(self, agreed: Callable[[bool], bool] = bool) -> None:
    self.requested = False
    self._heeded = False
    self._agreed = agreed
    self._at_once = False
    self._old: dict[int, Any] = {}

  def __enter__(self) -> 'Preemption':
    for number in (signal.SIGTERM, signal.SIGINT):
      self._old[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *exc: Any) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _handle(self, number: int, frame: Any) -> None:
    if self.requested:
      self.__exit__()
      signal.raise_signal(number)
    self.requested = True
    if self._at_once:
      self._heed()

  def _heed(self) -> None:
    self._heeded = True
    raise Preempted

  def check(self) -> None:
    """Raises Preempted if a stop was requested."""
    if self._agreed(self.requested):
      self._heed()

  def pass_on(self) -> None:
    """Raises KeyboardInterrupt if a stop was requested too late for `check`, so that nothing else is begun."""
    if not self._heeded and self._agreed(self.requested):
      raise KeyboardInterrupt

  @contextlib.contextmanager
  def at_once(self) -> Iterator[None]:
    """Inside, a request interrupts whatever runs: for phases with nothing to save, such as preparing data."""
    self.check()
    self._at_once = True
    try:
      yield
    finally:
      self._at_once = False
