"""How far a run has come: a bar on a terminal, and elsewhere a line now and then."""

import functools
import sys
import time
from collections.abc import Callable

from tqdm import tqdm

PERIOD = 15.0  # seconds between two lines
SAY = functools.partial(print, flush=True)  # at once, into a file too


class Progress:
  """Shows the steps of a run, or of several arms that train in one program.

  arms: how many train together; tokens are counted for all of them. quiet: whether nothing is shown, as by all
  processes but the first. say: takes a line.
  """

  def __init__(
    self, name: str, steps: int, step: int, arms: int = 1, quiet: bool = False, say: Callable[[str], object] = SAY
  ):
    self._name = f'{name} and {arms - 1} more' if arms > 1 else name
    self._steps, self._arms, self._quiet, self._say = steps, arms, quiet, say
    self._first: tuple[int, float, float] | None = None  # step, tokens and time after the first step, which compiles
    self._next = time.monotonic() + PERIOD
    on_terminal = sys.stderr.isatty() and not quiet
    self._bar = tqdm(total=steps, initial=step, desc=name, disable=not on_terminal, leave=False, unit='step')
    self._lines = not on_terminal and not quiet
    if 0 < step < steps and not quiet:
      say(f'{self._name}: goes on from step {step:,} of {steps:,}')

  def update(self, step: int, loss: float, tokens: float) -> None:
    """A step has ended. tokens: that one arm has been trained on so far."""
    self._bar.update(step - self._bar.n)
    now = time.monotonic()
    if self._first is None:
      self._first = step, tokens, now
      return
    if now >= self._next:
      self._next = now + PERIOD
      first, seen, began = self._first
      a_step, speed = (now - began) / (step - first), self._arms * (tokens - seen) / (now - began)
      left = duration((self._steps - step) * a_step)
      if self._lines:
        self._say(
          f'{self._name}: step {step:,} of {self._steps:,}, loss {loss:.3f}, {speed:,.0f} tokens/s, {left} left'
        )

  def show(self, text: str) -> None:
    """What stands beside the bar."""
    self._bar.set_postfix_str(text)

  def close(self) -> None:
    self._bar.close()


def duration(seconds: float) -> str:
  """'42 s', '7 min', '3.5 h', '2.1 d'."""
  if seconds < 100:
    return f'{seconds:.0f} s'
  if seconds < 6000:
    return f'{seconds / 60:.0f} min'
  return f'{seconds / 3600:.1f} h' if seconds < 48 * 3600 else f'{seconds / 86400:.1f} d'
