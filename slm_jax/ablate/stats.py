"""What few repetitions can say: means with t-intervals, paired differences, the smallest effect that would show.

All intervals are two-sided at 95 %. Formulas: Student's t, mean +- t(0.975, n - 1) s / sqrt(n).
"""

import math
from collections.abc import Hashable, Iterable, Mapping
from typing import NamedTuple

from scipy.special import stdtrit

LEVEL = 0.95


class Interval(NamedTuple):
  """A mean and what it is worth. half and sd are NaN for n = 1, and all but n for n = 0."""

  mean: float
  half: float  # half the width of the 95 % interval
  sd: float  # standard deviation of one value, n - 1 in the denominator
  n: int

  @property
  def detectable(self) -> float:
    """The effect that n such values would show with 80 % power: about 2.8 sd / sqrt(n), larger for small n."""
    return 2.8 * self.sd / math.sqrt(self.n) if self.n else math.nan


def interval(values: Iterable[float | None]) -> Interval:
  """Mean and 95 % t-interval; values that are missing or not finite are left out."""
  xs = [x for x in values if x is not None and math.isfinite(x)]
  n = len(xs)
  mean = math.fsum(xs) / n if n else math.nan
  if n < 2:
    return Interval(mean, math.nan, math.nan, n)
  sd = math.sqrt(math.fsum((x - mean) ** 2 for x in xs) / (n - 1))
  return Interval(mean, float(stdtrit(n - 1, (1 + LEVEL) / 2)) * sd / math.sqrt(n), sd, n)


def paired(ours: Mapping[Hashable, float | None], baseline: Mapping[Hashable, float | None]) -> Interval:
  """ours - baseline over the seeds that both have: what the seeds have in common cancels."""
  pairs = [(ours[seed], baseline[seed]) for seed in ours if seed in baseline]
  return interval(a - b for a, b in pairs if a is not None and b is not None)


def verdict(difference: Interval, unit: str = 'nats') -> str:
  """A paired difference in a loss (less is better), in words that claim no more than it shows."""
  mean, half, _, n = difference
  if n == 0:
    return 'cannot tell: no seed in common'
  if n == 1:
    return f'cannot tell: {digits(mean, half, "+")} {unit}, but n=1'
  if abs(mean) > half:
    return f'{"better" if mean < 0 else "worse"} by {digits(abs(mean), half)} {unit} (95 %), n={n}'
  return (
    f'cannot tell: {digits(mean, half, "+")} {unit} (95 %), n={n}; an effect below about '
    f'{difference.detectable:.2g} would not show'
  )


def expectation(difference: Interval) -> str:
  """What became of 'less than': a paired difference is expected to be negative, and its 95 % interval decides."""
  if not difference.n > 1 or abs(difference.mean) <= difference.half:
    return 'CANNOT TELL'
  return 'REPRODUCED' if difference.mean < 0 else 'NOT REPRODUCED'


def digits(mean: float, half: float, sign: str = '') -> str:
  """`0.0213 ± 0.0061`: as many decimals as the interval's second digit, and at most five."""
  decimals = 4 if not math.isfinite(half) else 5 if half <= 0 else min(5, max(0, 1 - math.floor(math.log10(half))))
  text = f'{mean:{sign}.{decimals}f}'.replace('-', '−')
  return f'{text} ± {half:.{decimals}f}' if math.isfinite(half) else text
