"""Claims of an experiment, and what became of them: REPRODUCED, NOT REPRODUCED or CANNOT TELL.

    def report(rows):
      loss = values(rows)
      return [
        less('kd < ce by 0.02 at equal tokens', loss['kd'], loss['ce'], by=0.02, primary=True),
        equal('kd = ce at equal FLOPs', loss['kd'], loss['ce, equal FLOPs'], within=0.02),
      ]

A claim brings a p value; whether it holds is decided over all claims of the experiment. At most PRIMARY of them are
primary: their p values are corrected by Holm, so that the chance of even one wrong verdict is at most 5 %. All others
are exploratory and are printed with their uncorrected p, without a verdict. An experiment that tests eighteen claims at
5 % each reports a false REPRODUCED every third time.

p values are two-sided: twice the chance of evidence this far beyond the border of a claim, if the truth lies on it. A
difference `a < b by m` has the border m; an equivalence within m has two, and the nearer one counts (two one-sided
tests, Schuirmann 1987).
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from slm_jax.ablate import comparison, stats
from slm_jax.ablate.comparable import LOSS, metric_of, why_apart
from slm_jax.ablate.comparison import Comparison
from slm_jax.ablate.results import Row
from slm_jax.config import require

PRIMARY = 3  # claims that an experiment may test
REPRODUCED, NOT_REPRODUCED, CANNOT_TELL, EXPLORATORY = 'REPRODUCED', 'NOT REPRODUCED', 'CANNOT TELL', 'exploratory'


OF_TEXT = ('bits_per_byte', 'exact_match')  # numbers that do not count tokens


class Claim(NamedTuple):
  """One expectation, and what the runs say about it."""

  what: str  # 'kd < ce by 0.02 at equal tokens'
  found: str  # '−0.021 ± 0.006 nats, n=5'
  p: float  # two-sided, uncorrected; NaN where nothing can be tested
  holds: bool  # whether the evidence is for the claim, where there is any
  primary: bool = False
  undecided: str = ''  # why the verdict must be CANNOT TELL, whatever p is


class Measured(dict[Hashable, float]):
  """One arm's numbers by seed; NaN where a run diverged or failed. Knows the runs that they are of."""

  def __init__(self, rows: Mapping[Hashable, Row], key: str, change: Callable[[float], float] = lambda value: value):
    self.rows, self.key, self.change = rows, key, change
    super().__init__({seeds: self._read(row) for seeds, row in rows.items()})

  def _read(self, row: Row) -> float:
    value = row.summary.get(self.key)
    return self.change(value) if isinstance(value, (int, float)) else math.nan

  def as_bits(self) -> 'Measured':
    """The same of the loss in bits per byte, which compares models of different tokenizers."""
    return Measured(self.rows, 'bits_per_byte', self.change)


def values(
  rows: Iterable[Row], key: str = LOSS.key, change: Callable[[float], float] = lambda value: value
) -> dict[str, Measured]:
  """`{name of an arm: its numbers}`, of the runs that have ended. key: of a run's summary; change: applied to each."""
  by_name: dict[str, dict[Hashable, Row]] = {}
  for row in rows:
    if row.ended:
      by_name.setdefault(row.name, {})[row.seeds] = row
  found = {name: Measured(own, key, change) for name, own in by_name.items()}
  return {name: own for name, own in found.items() if any(map(math.isfinite, own.values())) or key == LOSS.key}


# ------------------------------------------------------------------------------------------------------ kinds of claims


def less(
  what: str, ours: Mapping[Hashable, float], theirs: Mapping[Hashable, float], by: float = 0.0, primary: bool = False
) -> Claim:
  """Claims that ours is less than theirs by at least so much, over paired seeds. Negative: that it is not more by."""
  c, apart = _compare(ours, theirs)
  if apart or c.untestable:
    return _untested(what, c, apart or c.untestable, primary)
  border = c.difference.mean + by
  p = 2 * c.difference.tail(-abs(border)) if not c.are_equal or by else math.nan
  undecided = c.losses if c.favours_a_loser(border) else 'no difference within rounding' if math.isnan(p) else ''
  return Claim(what, _found(c), min(p, 1.0) if p == p else p, border < 0, primary, undecided)


def equal(
  what: str, ours: Mapping[Hashable, float], theirs: Mapping[Hashable, float], within: float, primary: bool = False
) -> Claim:
  """Claims that the two are equal within so much, over paired seeds."""
  require(within > 0, f'claim {what!r}: within={within}: must be positive')
  c, apart = _compare(ours, theirs)
  if apart or c.untestable:
    return _untested(what, c, apart or c.untestable, primary)
  inside = within - abs(c.difference.mean)  # to the nearer border; negative outside of both
  p = 2 * c.difference.tail(-abs(inside)) if not c.are_equal else 0.0
  return Claim(what, _found(c), min(p, 1.0), inside > 0, primary, c.losses)


def all_of(what: str, claims: Sequence[Claim], primary: bool = False) -> Claim:
  """Claims that all of these hold: an intersection-union test (Berger 1982), which needs no correction for its parts.

  Its p is the largest of theirs if the evidence is for all; else the smallest of those that speak against it, times
  their number (Bonferroni), for one part that fails is enough.
  """
  require(len(claims) > 0, f'claim {what!r}: of no parts')
  against = [claim for claim in claims if claim.p == claim.p and not claim.undecided and not claim.holds]
  held = [claim for claim in claims if claim.p < stats.ALPHA and not claim.undecided and claim.holds]
  found = f'{len(held)} of {len(claims)} parts hold by themselves (p < {stats.ALPHA:g})'
  if against:
    return Claim(what, found, min(1.0, len(claims) * min(claim.p for claim in against)), False, primary)
  undecided = '; '.join(dict.fromkeys(claim.undecided for claim in claims if claim.undecided))
  return Claim(what, found, max(claim.p for claim in claims), True, primary, undecided)


def inside(
  what: str,
  estimate: float,
  draws: Sequence[float],
  low: float,
  high: float,
  primary: bool = False,
  undecided: str = '',
) -> Claim:
  """Claims that a number lies between low and high, by draws of a bootstrap: the nearer border counts.

  The share of draws beyond the border is (k + 1) / (n + 1) of n, so that no p is 0.
  """
  xs, n = np.asarray(draws, np.float64), len(draws)
  holds = low <= estimate <= high
  below, above = int((xs <= low).sum()), int((xs >= high).sum())
  beyond = max(below, above) if holds else n - below if estimate < low else n - above
  a, b = np.quantile(xs, [(1 - stats.LEVEL) / 2, (1 + stats.LEVEL) / 2])
  found = f'{estimate:.3f}, 95 % bootstrap interval [{a:.3f}, {b:.3f}]'.replace('-', '−')
  return Claim(what, found, min(1.0, 2 * (beyond + 1) / (n + 1)), holds, primary, undecided)


def by_test(what: str, found: str, p: float, holds: bool, primary: bool = False, undecided: str = '') -> Claim:
  """A claim with a test of its own: a count of signs, say.

  p: two-sided, uncorrected. holds: whether the evidence is for the claim. undecided: why nothing can be told.
  """
  return Claim(what, found, p, holds, primary, undecided)


def _compare(ours: Mapping[Hashable, float], theirs: Mapping[Hashable, float]) -> tuple[Comparison, str]:
  """The comparison in a unit that both have, and why they may not be compared."""
  unit, apart = '', ''
  if isinstance(ours, Measured) and isinstance(theirs, Measured):
    rows = [*ours.rows.values(), *theirs.rows.values()]
    apart = why_apart(rows)
    metric = metric_of(rows)
    if ours.key == theirs.key == LOSS.key:
      unit = metric.unit
      if metric is not LOSS:
        ours, theirs = ours.as_bits(), theirs.as_bits()
    elif metric is not LOSS and ours.key not in OF_TEXT:
      apart = apart or f'{ours.key} is a mean over tokens, and the tokenizers differ'
  return comparison.compare(ours, theirs, unit), apart


def _found(c: Comparison) -> str:
  few = f' (fewer than {comparison.FEW} seeds)' if c.n < comparison.FEW else ''
  agree = f', {c.agree} of {c.n} seeds agree in sign' if c.n > 1 else ''
  return f'{c.shown.strip()}, n={c.n}{few}{agree}' if c.n else 'n=0'


def _untested(what: str, c: Comparison, why: str, primary: bool) -> Claim:
  return Claim(what, _found(c), math.nan, False, primary, '; '.join(dict.fromkeys(filter(None, (why, c.losses)))))


# -------------------------------------------------------------------------------------------------------- the verdicts


class Decided(NamedTuple):
  """A claim with its verdict, as it is recorded and shown."""

  what: str
  found: str
  verdict: str  # REPRODUCED, NOT REPRODUCED, CANNOT TELL; or exploratory
  evidence: str  # 'p=0.012 (Holm over 3)'
  remark: str = ''  # why nothing can be told

  def __str__(self) -> str:
    rest = '; '.join(filter(None, (self.evidence, self.remark)))
    return f'{self.verdict}: {self.what}: {self.found}{f" ({rest})" if rest else ""}'


def decide(claims: Sequence[Claim]) -> list[Decided]:
  """The verdicts, primary claims first. ConfigError for more than PRIMARY primary ones."""
  primary = [claim for claim in claims if claim.primary]
  names = ', '.join(repr(claim.what) for claim in primary)
  require(len(primary) <= PRIMARY, f'report(): {len(primary)} primary claims ({names}); allowed: {PRIMARY}')
  adjusted = stats.holm([claim.p for claim in primary])
  tests = sum(claim.p == claim.p for claim in primary)
  found = [_primary(claim, p, tests) for claim, p in zip(primary, adjusted, strict=True)]
  return found + [_exploratory(claim) for claim in claims if not claim.primary]


def _primary(claim: Claim, p: float, tests: int) -> Decided:
  holm = f' (Holm over {tests})' if tests > 1 else ''
  evidence = f'p{_p(p)}{holm}' if p == p else ''
  if claim.undecided or not p < stats.ALPHA:
    return Decided(claim.what, claim.found, CANNOT_TELL, evidence, claim.undecided)
  return Decided(claim.what, claim.found, REPRODUCED if claim.holds else NOT_REPRODUCED, evidence)


def _exploratory(claim: Claim) -> Decided:
  side = 'for it' if claim.holds else 'against it'
  evidence = f'{side}, p{_p(claim.p)} uncorrected' if claim.p == claim.p else ''
  return Decided(claim.what, claim.found, EXPLORATORY, evidence, claim.undecided)


def _p(p: float) -> str:
  return '<0.001' if p < 0.001 else f'={p:.3f}'


class Answer(NamedTuple):
  """What an experiment's report says: text as it is, and decided claims."""

  text: str = ''
  claims: tuple[Decided, ...] = ()

  def __str__(self) -> str:
    primary = [f'- {claim}' for claim in self.claims if claim.verdict != EXPLORATORY]
    others = [f'- {claim}' for claim in self.claims if claim.verdict == EXPLORATORY]
    head = 'Primary claims' + f', p corrected by Holm for {len(primary)}' * (len(primary) > 1)
    blocks = [self.text, _block(head, primary), _block('Exploratory, uncorrected: no verdicts', others)]
    return '\n\n'.join(filter(None, blocks))


def _block(head: str, lines: Sequence[str]) -> str:
  return '\n'.join([f'{head}:', *lines]) if lines else ''


def answer_of(said: Any) -> Answer:
  """What `report(rows)` returned: a text, a claim, or a sequence of both. ConfigError for anything else."""
  parts = [said] if isinstance(said, (str, Claim)) else said
  wrong = 'report(rows) returned {!r}, expected texts and claims (slm_jax.ablate.claims)'
  require(isinstance(parts, Iterable), wrong.format(said))
  parts = list(parts)
  for part in parts:
    require(isinstance(part, (str, Claim)), wrong.format(part))
  text = '\n'.join(part for part in parts if isinstance(part, str))
  return Answer(text, tuple(decide([part for part in parts if isinstance(part, Claim)])))
