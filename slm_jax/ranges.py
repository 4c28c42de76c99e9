"""Intervals in which the numbers of a configuration must lie, and the words for a number that lies outside.

    '[0, 1)'    '(0, inf)'    '[1, 2^31)'    '[0, 1] or -1'

A square bracket includes the end. `inf` stands for the largest float32, because the program computes in float32: a
larger number would be infinite there. `or X` allows one more value, which means something else (such as "stays").

Upper ends have reasons: 2^31 is where int32 ends, in which programs count steps, tokens and rows; 2^32 is where the
seeds of JAX's random numbers begin again from 0.
"""

import functools
import re
from typing import NamedTuple

SMALLEST, LARGEST = 2.0**-126, 2.0**128 * (1 - 2.0**-24)  # normal float32; processors round what is smaller to 0
_FORM = re.compile(r'([\[(])([^,]+), ([^,]+)([\])])(?: or (-?\d+))?')


class Range(NamedTuple):
  """An interval, and at most one value besides."""

  interval: str
  low: float
  high: float
  has_low: bool
  has_high: bool
  besides: float | None

  def fault(self, value: int | float) -> str:
    """Says what the value must be; '' if it is."""
    too_low = value < self.low or (value == self.low and not self.has_low)
    too_high = value > self.high or (value == self.high and not self.has_high)
    if value == self.besides:
      return ''
    if not (too_low or too_high):
      tiny = isinstance(value, float) and 0 < abs(value) < SMALLEST
      return 'must be 0 or at least 2^-126, the smallest float32' if tiny else ''
    words = f'must lie in {self.interval}'
    more = '' if self.besides is None else f', or be {self.besides:g}'
    if too_low and self.high >= 1000:  # far away: the upper end would only distract
      sign = {'[0': 'must not be negative', '(0': 'must be positive', '[1': 'must be positive'}
      if start := sign.get(self.interval.partition(',')[0]):
        return start + more.replace('be ', '')
    return words + more


@functools.cache
def parse(text: str) -> Range:
  """The range that a text such as '[0, 1)' means. ValueError for any other text."""
  found = _FORM.fullmatch(text)
  if not found:
    raise ValueError(f"range {text!r}: expected an interval such as '[0, 1)', '(0, inf)' or '[0, 2^31) or -1'")
  opening, low, high, closing, besides = found.groups()
  interval = text.partition(' or ')[0]
  ends = _number(low), _number(high)
  if ends[0] >= ends[1]:
    raise ValueError(f'range {text!r}: is empty')
  # An end at infinity is the largest float32, which belongs to the range.
  closed = opening == '[' or low == '-inf', closing == ']' or high == 'inf'
  return Range(interval, *ends, *closed, None if besides is None else float(besides))


def _number(text: str) -> float:
  if text.lstrip('-') == 'inf':
    return LARGEST if text[0] != '-' else -LARGEST
  base, power, exponent = text.partition('^')
  return float(int(base) ** int(exponent)) if power else float(text)
