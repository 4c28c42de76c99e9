"""One arm against another: paired differences, and a verdict that claims no more than they show.

A seed that diverged or failed is a result too, and a bad one: it has no number, so it cannot enter a mean, and leaving
it out would favour the arm whose worst seeds are missing. So no verdict favours an arm that lost a seed.
"""

import math
from collections.abc import Hashable, Mapping
from typing import NamedTuple

from slm_jax.ablate import stats
from slm_jax.ablate.stats import Interval

FEW = 5  # seeds; a verdict from fewer is marked
# Sums of float32 losses, as a part of the larger of the two: what is nearer than this is the same measurement.
RESOLUTION = 1e-6

Values = Mapping[Hashable, float | None]  # {seeds: a number, or none if the run has none}


class Comparison(NamedTuple):
  """Differences ours - theirs over the seeds of which both have a number."""

  difference: Interval
  agree: int  # seeds whose difference has the sign of the mean
  lost: tuple[int, int]  # seeds of ours, and of theirs, that were run and have no number: they diverged or failed
  seeds: tuple[int, int]  # of ours and of theirs, in all
  resolution: float  # differences below it are none
  unit: str = 'nats'

  @property
  def n(self) -> int:
    return self.difference.n

  @property
  def p(self) -> float:
    """Two-sided, of the paired t-test; NaN where there is nothing to test."""
    return math.nan if self.are_equal or self.difference.sd < self.resolution else self.difference.p

  @property
  def are_equal(self) -> bool:
    """Whether the two are the same within the resolution, in every seed."""
    spread = self.difference.sd if self.n > 1 else 0.0
    return self.n > 0 and max(abs(self.difference.mean), spread) < self.resolution

  @property
  def shown(self) -> str:
    """'−0.021 ± 0.006 nats'."""
    return f'{stats.digits(self.difference.mean, self.difference.half, "+")} {self.unit}'

  @property
  def losses(self) -> str:
    """'2 of 3 seeds diverged or failed'; '' if none of either did."""
    words = [f'{lost} of {n} seeds' for lost, n in zip(self.lost, self.seeds, strict=True)]
    ours = f'{words[0]} diverged or failed' * (self.lost[0] > 0)
    theirs = f'{words[1]} of the other diverged or failed' * (self.lost[1] > 0)
    return ' and '.join(filter(None, (ours, theirs)))

  @property
  def untestable(self) -> str:
    """Why there is nothing to test; '' if there is."""
    if self.n == 0:
      return self.losses or 'no seed in common'
    if self.are_equal:
      return ''
    if self.n == 1:
      return 'one seed'
    if self.difference.sd < self.resolution:
      return f'all {self.n} differences are the same, so that the seeds repeat nothing'
    return ''

  def favours_a_loser(self, mean: float) -> bool:
    """Whether a verdict in favour of the smaller side would favour an arm that lost a seed; mean: ours - theirs."""
    return self.lost[0 if mean < 0 else 1] > 0


def compare(ours: Values, theirs: Values, unit: str = 'nats') -> Comparison:
  """Compares two arms over the seeds that both have.

  A value that is missing, None or not finite counts as lost where the seed was run.
  """
  known = [{seed: x for seed, x in side.items() if x is not None and math.isfinite(x)} for side in (ours, theirs)]
  pairs = [(known[0][seed], known[1][seed]) for seed in known[0] if seed in known[1]]
  difference = stats.interval(a - b for a, b in pairs)
  size = max((abs(x) for pair in pairs for x in pair), default=0.0)
  return Comparison(
    difference,
    sum((a - b) * difference.mean > 0 for a, b in pairs),
    (len(ours) - len(known[0]), len(theirs) - len(known[1])),
    (len(ours), len(theirs)),
    RESOLUTION * size,
    unit,
  )


class Verdict(NamedTuple):
  """What a comparison says. word: better, worse, no difference or cannot tell."""

  word: str
  size: str  # '−0.021 ± 0.006 nats'; '' where there is no number
  evidence: str  # p, seeds, signs; '' where nothing was tested
  remark: str  # what a reader must know besides: lost seeds, how many more it takes

  def __str__(self) -> str:
    """'better: −0.021 ± 0.006 nats (p=0.004, n=5, 5 of 5 seeds agree in sign)'."""
    inside = f' ({self.evidence})' if self.evidence else ''
    return f'{self.word}{f": {self.size}" if self.size else ""}{inside}{f"; {self.remark}" if self.remark else ""}'


def judge(comparison: Comparison, p: float | None = None, comparisons: int = 1) -> Verdict:
  """The verdict about a loss, of which less is better.

  p: adjusted for `comparisons` (see `stats.holm`), if they are several.
  """
  c, lost = comparison, comparison.losses
  if c.untestable:
    remark = c.untestable if c.n == 0 else '; '.join(filter(None, (c.untestable, lost)))
    return Verdict('cannot tell', c.shown if c.n else '', '', remark)
  if c.are_equal:
    return Verdict('no difference', '', f'n={c.n}', '; '.join(filter(None, ('the same within rounding', lost))))
  p = c.p if p is None else p
  evidence = evidence_of(c, p, comparisons)
  if p >= stats.ALPHA:
    return Verdict('cannot tell', c.shown, evidence, '; '.join(filter(None, (needs(c, comparisons), lost))))
  if c.favours_a_loser(c.difference.mean):
    return Verdict('cannot tell', c.shown, evidence, lost)
  return Verdict('better' if c.difference.mean < 0 else 'worse', c.shown, evidence, lost)


def evidence_of(comparison: Comparison, p: float, comparisons: int = 1) -> str:
  """'p=0.004 (Holm over 3), n=3 (fewer than 5 seeds), 3 of 3 seeds agree in sign'."""
  n = comparison.n
  holm = f' (Holm over {comparisons})' if comparisons > 1 else ''
  few = f' (fewer than {FEW} seeds)' if n < FEW else ''
  sign = '<0.001' if p < 0.001 else f'={p:.3f}'
  return f'p{sign}{holm}, n={n}{few}, {comparison.agree} of {n} seeds agree in sign'


def needs(comparison: Comparison, comparisons: int = 1) -> str:
  """'needs 6 to 680 seeds': see `stats.seeds_range`; over several comparisons at ALPHA / comparisons, Holm's first."""
  fewest, most = stats.seeds_range(comparison.difference, stats.ALPHA / comparisons)
  beyond = f'more than {stats.MOST_SEEDS:,}'
  if fewest is None:
    return f'needs {beyond} seeds'
  fewest = max(fewest, comparison.n + 1)
  return f'needs {fewest} to {beyond if most is None else max(most, fewest)} seeds'
