"""What few repetitions can say: means with intervals, p values, and how many seeds it would take.

All intervals and tests are two-sided at 95 %, and ALPHA = 0.05 is what a p value is held against.

    interval    mean +- t(0.975, n - 1) s / sqrt(n), Student's t
    p           of the paired t-test: P(|T| >= |mean| sqrt(n) / s) with n - 1 degrees of freedom
    power       an effect d shows with probability P(T' > t(1 - alpha/2, n - 1)), T' noncentral t with d sqrt(n) / s
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy  # which loads its parts when they are asked for: a worker asks for none

LEVEL = 0.95
ALPHA = 0.05
POWER = 0.8
MOST_SEEDS = 1000  # more than anybody will run: an effect that needs them is as good as none


class Interval(NamedTuple):
  """A mean and what it is worth. half and sd are NaN for n = 1, and all but n for n = 0."""

  mean: float
  half: float  # half the width of the 95 % interval
  sd: float  # standard deviation of one value, n - 1 in the denominator
  n: int

  @property
  def p(self) -> float:
    """How often a mean at least so far from zero would be seen if the true one were zero.

    NaN for n < 2, and for values that are all the same: a test needs their spread.
    """
    return 2 * self.tail(-abs(self.mean))

  def tail(self, distance: float) -> float:
    """P(T <= distance sqrt(n) / s): how often a mean lies so far below the true one. NaN where `p` is."""
    if self.n < 2 or self.sd == 0:
      return 0.5 if self.n > 1 and distance == 0 else math.nan
    return float(scipy.special.stdtr(self.n - 1, distance * math.sqrt(self.n) / self.sd))

  @property
  def detectable(self) -> float:
    """The effect that n such values show with 80 % power; NaN for n < 2."""
    return noncentrality(self.n) * self.sd / math.sqrt(self.n) if self.n > 1 else math.nan


def interval(values: Iterable[float | None]) -> Interval:
  """Mean and 95 % t-interval; values that are missing or not finite are left out."""
  xs = [x for x in values if x is not None and math.isfinite(x)]
  n = len(xs)
  mean = math.fsum(xs) / n if n else math.nan
  if n < 2:
    return Interval(mean, math.nan, math.nan, n)
  sd = math.sqrt(math.fsum((x - mean) ** 2 for x in xs) / (n - 1))
  return Interval(mean, float(scipy.special.stdtrit(n - 1, (1 + LEVEL) / 2)) * sd / math.sqrt(n), sd, n)


def bootstrap(
  values: Sequence[float],
  statistic: Callable[..., Any] = np.mean,
  method: str = 'BCa',
  draws: int = 10_000,
  seed: int = 0,
) -> tuple[float, float]:
  """`(low, high)` of the 95 % bootstrap interval of a statistic of values that need not be normal.

  statistic: takes an array and `axis`. method: 'BCa' (bias-corrected and accelerated, Efron 1987) or 'percentile'.
  NaN for fewer than two values. With fewer than about ten it is too narrow, and the t-interval is the better one.
  """
  xs = np.asarray(values, np.float64)
  if len(xs) < 2:
    return math.nan, math.nan
  if np.ptp(xs) == 0:  # every sample is the same, and BCa divides by their spread
    value = float(statistic(xs, axis=0))
    return value, value
  found = scipy.stats.bootstrap(
    (xs,), statistic, confidence_level=LEVEL, n_resamples=draws, method=method, rng=np.random.default_rng(seed)
  ).confidence_interval
  return float(found.low), float(found.high)


# ------------------------------------------------------------------------------------------- several comparisons


def holm(ps: Sequence[float]) -> list[float]:
  """p values adjusted for their number: the chance of even one false claim among them stays at most 5 %.

  The i-th smallest of m becomes max over j <= i of (m - j + 1) p_j, at most 1 (Holm 1979). NaN stays NaN and does not
  count: a comparison that could not be made claims nothing.
  """
  adjusted, largest = [math.nan] * len(ps), 0.0
  order = sorted((i for i, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i])
  for rank, i in enumerate(order):
    largest = max(largest, min(1.0, (len(order) - rank) * ps[i]))
    adjusted[i] = largest
  return adjusted


# ------------------------------------------------------------------------------------------------- how many seeds


def noncentrality(n: int, alpha: float = ALPHA) -> float:
  """effect * sqrt(n) / sd at which n values show the effect with 80 % power; tends to 2.80 for many, 5.65 for n = 3."""
  return float(scipy.special.nctdtrinc(n - 1, 1 - POWER, scipy.special.stdtrit(n - 1, 1 - alpha / 2)))


def seeds_needed(effect: float, sd: float, alpha: float = ALPHA) -> int | None:
  """The fewest values with that standard deviation that show the effect with 80 % power; None if over MOST_SEEDS."""

  def shows(n: int) -> bool:
    return abs(effect) * math.sqrt(n) >= noncentrality(n, alpha) * sd

  if not shows(MOST_SEEDS):
    return None
  low, high = 1, MOST_SEEDS  # more values always show more, so that halving finds the first that are enough
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (low, middle) if shows(middle) else (middle, high)
  return high


def seeds_range(difference: Interval, alpha: float = ALPHA) -> tuple[int | None, int | None]:
  """`(fewest, most)`: an 80 % interval of the seeds that would show a difference such as this one with 80 % power.

  The difference and its deviation were themselves measured from n seeds, and a number of seeds that is computed from
  them as they stand says little: from n = 3 it lies between 6 and 676 in 80 % of cases where 34 is right. So the
  interval of the standardised difference (of the noncentral t distribution, 10 to 90 %) is carried through. None: more
  than MOST_SEEDS, which is also the end of a difference whose sign is open.
  """
  n, t = difference.n, abs(difference.mean) * math.sqrt(difference.n) / difference.sd
  weak, strong = (float(scipy.special.nctdtrinc(n - 1, level, t)) for level in (0.9, 0.1))
  central = float(scipy.special.stdtr(n - 1, t))
  needed = [seeds_needed(d / math.sqrt(n), 1.0, alpha) if d > 0 else None for d in (strong, weak)]
  return needed[0], needed[1] if central > 0.9 else None


# ----------------------------------------------------------------------------------------------------------- words


def p_text(p: float) -> str:
  return '<0.001' if p < 0.001 else f'{p:.3f}'


def digits(mean: float, half: float, sign: str = '') -> str:
  """`0.0213 ± 0.0061`: as many decimals as the interval's second digit, and at most seven."""
  if half <= 1e-9 * abs(mean):  # what rounding leaves of equal values
    half = 0.0
  decimals = 4 if not math.isfinite(half) else 5 if half <= 0 else min(7, max(0, 1 - math.floor(math.log10(half))))
  text = f'{mean:{sign}.{decimals}f}'.replace('-', '−')
  return f'{text} ± {half:.{decimals}f}' if math.isfinite(half) else text
