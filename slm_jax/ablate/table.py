"""One line for each arm of an experiment, its repetitions over seeds together; and such lines as text."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from slm_jax.ablate import controls, results, stats
from slm_jax.ablate.results import Point, Row
from slm_jax.ablate.stats import Interval


class AtEqualCost(NamedTuple):
  """One arm over its seeds in one of the controls."""

  budget: float  # the same for all arms
  loss: Interval
  difference: Interval | None  # as Line's


class Line(NamedTuple):
  """One arm over its seeds. Losses in nats per token."""

  name: str
  rows: Sequence[Row]
  loss: Interval
  difference: Interval | None  # of the loss to the baseline's, by seed; None for the baseline
  p: float  # of the difference, adjusted for the number of comparisons; NaN where there is none
  comparisons: int  # of the whole table
  at_equal: Mapping[str, AtEqualCost]  # {unit: ...}, see `controls`; empty where no curves were given

  @property
  def verdict(self) -> str:
    return 'baseline' if self.difference is None else stats.verdict(self.difference, 'nats', self.p, self.comparisons)

  def mean(self, metric: str) -> float:
    """Of a metric of the summaries over the seeds that are done; NaN if none of them has it."""
    return self.interval(metric).mean

  def interval(self, metric: str) -> Interval:
    return stats.interval(row.summary.get(metric) for row in self.rows)


def lines(rows: Iterable[Row], baseline: str, curves: Mapping[str, Sequence[Point]] | None = None) -> list[Line]:
  """A line for each arm, in the order of the rows; all are compared with the arm named `baseline`.

  curves: see `results.curves`; with them, the arms are also compared at equal cost.
  """
  rows = list(rows)
  groups = results.groups(rows)
  if baseline not in groups:  # two arms of that name: the one that was launched first
    baseline = next((label for label, members in groups.items() if members[0].name == baseline), '')
  final = {row.arm_id: row.summary['loss'] for row in rows if row.summary}
  losses, differences = _compared(groups, baseline, final)
  ps = stats.holm([math.nan if d is None else d.p for d in differences])
  at_equal: dict[str, dict[str, AtEqualCost]] = {label: {} for label in groups}
  for unit, budget, known in controls.controls(rows, curves or {}):
    for label, loss, difference in zip(groups, *_compared(groups, baseline, known), strict=True):
      at_equal[label][unit] = AtEqualCost(budget, loss, difference)
  comparisons = sum(not math.isnan(p) for p in ps)
  return [
    Line(label, groups[label], loss, difference, p, comparisons, at_equal[label])
    for label, loss, difference, p in zip(groups, losses, differences, ps, strict=True)
  ]


def _compared(
  groups: Mapping[str, Sequence[Row]], baseline: str, known: Mapping[str, float]
) -> tuple[list[Interval], list[Interval | None]]:
  """Mean losses, and their differences to the baseline's by seed, in the order of the groups. known: {arm id: loss}."""
  by_seed = {label: {row.seeds: known.get(row.arm_id) for row in members} for label, members in groups.items()}
  reference = by_seed.get(baseline, {})
  losses = [stats.interval(values.values()) for values in by_seed.values()]
  return losses, [None if label == baseline else stats.paired(by_seed[label], reference) for label in groups]


# ---------------------------------------------------------------------------------------------------------- text


def text(lines: Sequence[Line]) -> str:
  """The tables for a terminal, and under each how to read it."""
  head = ('arm', 'n', 'loss', 'gap', 'bits/byte', 'accuracy', 'tokens', 'FLOPs', 'params', 'seconds')
  body = [
    (
      line.name,
      seeds_done(line),
      spread(line.loss),
      number(line.mean('gap'), '.4f'),
      number(line.mean('bits_per_byte'), '.4f'),
      number(line.mean('accuracy'), '.1%'),
      short(line.mean('tokens')),
      short(line.mean('flops')),
      short(line.mean('parameters')),
      number(line.mean('seconds'), '.0f'),
      line.verdict if line.difference is None or line.difference.n else '–',
    )
    for line in lines
  ]
  parts = [columns([(*head, 'against baseline'), *body], right=range(1, 10)), note(lines)]
  if units(lines):
    titles = ('arm', *(cell for unit in units(lines) for cell in (f'at {controls.TITLES[unit]}', 'difference')))
    rows = [
      (line.name, *(cell for at in row for cell in (spread(at.loss), spread(at.difference, '+'))))
      for line, row in equal_cost(lines)
    ]
    parts += ['', columns([titles, *rows], right=range(1, len(titles)))]
  return '\n'.join([*parts, note_on_controls(lines)]).strip()


def units(lines: Sequence[Line]) -> list[str]:
  """The controls that tell something: some arm used more than another, and two or more of them can be read there; and
  for pipeline FLOPs, some arm has parents."""

  def differs(at: Interval, final: Interval) -> bool:
    return at.n != final.n or (final.n > 0 and not math.isclose(at.mean, final.mean, rel_tol=1e-9))

  known = [unit for unit in _controlled(lines) if unit != 'pipeline' or have_parents(lines)]
  return [
    unit
    for unit in known
    if any(differs(line.at_equal[unit].loss, line.loss) for line in lines) and _readable(lines, unit) > 1
  ]


def _readable(lines: Sequence[Line], unit: str) -> int:
  """How many arms have a loss at the budget of a control: they were evaluated so early."""
  return sum(line.at_equal[unit].loss.n > 0 for line in lines)


def have_parents(lines: Sequence[Line]) -> bool:
  """Whether any arm builds on another, whose training it would not be without."""
  return any(line.mean('parent_flops') > 0 for line in lines)


def _controlled(lines: Sequence[Line]) -> list[str]:
  return list(dict.fromkeys(unit for line in lines for unit in line.at_equal))


def equal_cost(lines: Sequence[Line]) -> list[tuple[Line, list[AtEqualCost]]]:
  """The arms that can be read in some control, each with what it has in all of `units`."""
  of = units(lines)
  rows = [(line, [line.at_equal[unit] for unit in of]) for line in lines]
  return [(line, row) for line, row in rows if any(at.loss.n for at in row)]


def note(lines: Sequence[Line]) -> str:
  """How to read the table."""
  baseline = next((line.name for line in lines if line.difference is None), '')
  words = 'Loss in nats per token, mean ± 95 % t-interval over n seeds; gap: to the entropy of the data'
  if any(line.difference is not None and line.difference.n > 0 for line in lines):
    words += f'; differences to {baseline!r} are paired by seed, p by the paired t-test'
  if lines and lines[0].comparisons > 1:
    words += f', corrected by Holm for {lines[0].comparisons} comparisons (intervals are not)'
  return words + '.'


def note_on_controls(lines: Sequence[Line]) -> str:
  """How to read the comparison at equal cost, a sentence a column; '' if there is none."""
  budgets = {unit: short(next(line.at_equal[unit].budget for line in lines)) for unit in units(lines)}
  sentences = {
    'tokens': 'At equal tokens: each arm’s loss when it had seen {}, the most that all arms reached.',
    'flops': 'At equal FLOPs: when its own training had taken {}, a teacher’s forward passes included.',
    'pipeline': 'At equal pipeline FLOPs: when that and all that its parents took (a teacher’s own training, in full '
    'for each arm that uses it) came to {}; – where the parents alone took more.',
  }
  words = [sentences[unit].format(budget) for unit, budget in budgets.items()]
  if words:
    words += [
      'Losses between two evaluations are interpolated in the logarithm of the budget.',
      'An arm that went on is read before its learning rate has come down, so it looks worse than one made for it.',
    ]
  parents = have_parents(lines)
  others = [u for u in _controlled(lines) if u not in budgets and (u != 'pipeline' or parents)]
  unread = [f'at {controls.TITLES[u]}' for u in others if _readable(lines, u) < 2 <= len(lines)]
  if unread:
    words.append(f'No comparison {" and ".join(unread)}: too few arms were evaluated so early.')
  if budgets and len(equal_cost(lines)) < len(lines):
    words.append('Arms that were not evaluated so early are left out.')
  same = [f'at {controls.TITLES[u]}' for u in others if f'at {controls.TITLES[u]}' not in unread]
  if same:
    words.append(f'The final losses are those {" and ".join(same)} too: no arm used more than another.')
  if 'pipeline' in _controlled(lines) and not parents:
    words.append('No arm builds on another, so that pipeline FLOPs are FLOPs.')
  return ' '.join(words)


def spread(value: Interval | None, sign: str = '') -> str:
  """'1.470 ± 0.025', or a dash where there is none."""
  return stats.digits(value.mean, value.half, sign) if value is not None and value.n else '–'


def seeds_done(line: Line) -> str:
  return f'{line.loss.n}' if line.loss.n == len(line.rows) else f'{line.loss.n} of {len(line.rows)}'


def number(value: float | None, spec: str) -> str:
  """A number, or a dash where there is none."""
  return '–' if value is None or value != value else format(value, spec)


def short(value: float | None) -> str:
  """1234567 -> '1.23M'."""
  if value is None or value != value:
    return '–'
  for unit, size in (('E', 1e18), ('P', 1e15), ('T', 1e12), ('G', 1e9), ('M', 1e6), ('K', 1e3)):
    if abs(value) >= size:
      return f'{value / size:.3g}{unit}'
  return f'{value:.3g}'


def columns(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> str:
  """Aligned columns under an underlined head; those whose index is in `right` end flush."""
  right = set(right)
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

  def line(cells):
    padded = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
    return '  '.join(padded).rstrip()

  return '\n'.join([line(rows[0]), line(['-' * w for w in widths]), *map(line, rows[1:])])
