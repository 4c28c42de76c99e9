"""The arms compared at equal cost: the loss of each, read off its curve at the largest budget that all of them reached.

    tokens      what the arm itself trained on; bytes of text where the arms have different tokenizers
    flops       of its own training, a teacher's forward passes included
    pipeline    those, and before its first step all that went into the arms it builds on, each counted once

Between two evaluations the loss is interpolated linearly in the logarithm of the budget, along which curves of training
are nearly straight. An arm that has no evaluation at or below the budget has no loss at it: nothing is extrapolated.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from slm_jax.ablate.comparable import LOSS, Metric
from slm_jax.ablate.results import Point, Row

TITLES = {
  'tokens': 'equal tokens',
  'bytes': 'equal bytes',
  'flops': 'equal FLOPs',
  'pipeline': 'equal pipeline FLOPs',
}
SLACK = 0.01  # a run that ends so near the budget is read at its end: packed batches differ by a few tokens


class Control(NamedTuple):
  unit: str  # a key of TITLES
  budget: float  # the smallest of what the runs have used in all
  losses: Mapping[str, float]  # {arm id: loss, by the metric}


def controls(rows: Iterable[Row], curves: Mapping[str, Sequence[Point]], metric: Metric = LOSS) -> list[Control]:
  """A control for each unit that is known of all runs. Runs that are not done, were not trained (but measured as they
  start), or have no curve, are not compared.

  curves: see `results.curves`. metric: see `comparable.metric_of`.
  """
  compared = [row for row in rows if row.summary and (curve := curves.get(row.arm_id)) and curve[-1].tokens > 0]
  found = []
  for unit in ('tokens' if metric is LOSS else 'bytes', 'flops', 'pipeline'):
    spent = {row.arm_id: used(unit, row, curves[row.arm_id]) for row in compared}
    if not spent or any(math.isnan(x) for xs in spent.values() for x in xs):
      continue
    budget = min(xs[-1] for xs in spent.values())
    read = {arm_id: read_off(xs, [metric.of(p) for p in curves[arm_id]], budget) for arm_id, xs in spent.items()}
    found.append(Control(unit, budget, {arm_id: loss for arm_id, loss in read.items() if loss is not None}))
  return found


def used(unit: str, row: Row, points: Sequence[Point]) -> list[float]:
  """What the arm had used at each of its evaluations; NaN where that is not known."""
  if unit == 'tokens':
    return [point.tokens for point in points]
  if unit == 'bytes':
    return [math.nan if point.bytes is None else point.bytes for point in points]
  before = row.summary.get('parent_flops') if unit == 'pipeline' else 0.0
  return [math.nan if before is None or point.flops is None else before + point.flops for point in points]


def read_off(xs: Sequence[float], losses: Sequence[float], budget: float) -> float | None:
  """The loss at a budget, of a curve whose `xs` grow; None if it begins above it."""
  known = [(x, loss) for x, loss in zip(xs, losses, strict=True) if x > 0]  # nothing spent has no logarithm
  if known and budget >= (1 - SLACK) * known[-1][0]:
    return known[-1][1]
  if not known or budget < known[0][0]:
    return None
  return float(np.interp(math.log(budget), [math.log(x) for x, _ in known], [loss for _, loss in known]))


def columns(found: Iterable[Control]) -> dict[str, Mapping[str, float]]:
  """`{column of results.csv: {arm id: loss}}`."""
  return {f'loss_at_{TITLES[unit].lower().replace(" ", "_")}': losses for unit, _, losses in found}
