"""One line for each arm of an experiment, its repetitions over seeds together; and such lines as text."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from slm_jax.ablate import comparison, controls, results, stats
from slm_jax.ablate.comparable import BITS, LOSS, Metric, metric_of, why_apart
from slm_jax.ablate.comparison import Comparison, Verdict
from slm_jax.ablate.results import Point, Row
from slm_jax.ablate.stats import Interval

FEW_MARK = '*'
ASSUMED = (
  'Intervals and p assume that differences between seeds are independent and roughly normal,'
  ' and hold for this text and these settings only.'
)


class AtEqualCost(NamedTuple):
  """One arm over its seeds in one of the controls."""

  budget: float  # the same for all arms
  loss: Interval
  difference: Interval | None  # as Line's


class Line(NamedTuple):
  """One arm over its seeds."""

  name: str
  rows: Sequence[Row]
  metric: Metric  # of loss and differences; the same in a whole table
  loss: Interval
  comparison: Comparison | None  # with the baseline, by seed; None for the baseline, and where `apart` says why
  apart: str  # why it is not compared with the baseline; '' if it is, or is the baseline
  p: float  # of the comparison, adjusted for the number of comparisons; NaN where there is none
  comparisons: int  # of the whole table
  at_equal: Mapping[str, AtEqualCost]  # {unit: ...}, see `controls`; empty where no curves were given

  @property
  def is_baseline(self) -> bool:
    return self.comparison is None and not self.apart

  @property
  def difference(self) -> Interval | None:
    """Of the loss to the baseline's, by seed."""
    return None if self.comparison is None else self.comparison.difference

  @property
  def verdict(self) -> Verdict:
    if self.comparison is None:
      return Verdict('not compared' if self.apart else 'baseline', '', '', self.apart)
    return comparison.judge(self.comparison, self.p if self.p == self.p else None, self.comparisons)

  @property
  def lost(self) -> int:
    """Its seeds that diverged or failed."""
    return sum(row.ended and not row.summary for row in self.rows)

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
  groups, metric = results.groups(rows), metric_of(rows)
  if baseline not in groups:  # two arms of that name: the one that was launched first
    baseline = next((label for label, members in groups.items() if members[0].name == baseline), '')
  apart = {
    label: '' if label == baseline else why_apart([*members, *groups.get(baseline, ())])
    for label, members in groups.items()
  }
  final = {row.arm_id: row.summary[metric.key] for row in rows if row.summary}
  losses, found = _compared(groups, baseline, apart, final, metric)
  ps = stats.holm([math.nan if each is None else each.p for each in found])
  at_equal: dict[str, dict[str, AtEqualCost]] = {label: {} for label in groups}
  for unit, budget, known in controls.controls(rows, curves or {}, metric):
    for label, loss, each in zip(groups, *_compared(groups, baseline, apart, known, metric), strict=True):
      at_equal[label][unit] = AtEqualCost(budget, loss, each and each.difference)
  comparisons = sum(not math.isnan(p) for p in ps)
  return [
    Line(label, groups[label], metric, loss, each, apart[label], p, comparisons, at_equal[label])
    for label, loss, each, p in zip(groups, losses, found, ps, strict=True)
  ]


def _compared(
  groups: Mapping[str, Sequence[Row]],
  baseline: str,
  apart: Mapping[str, str],
  known: Mapping[str, float],
  metric: Metric,
) -> tuple[list[Interval], list[Comparison | None]]:
  """Mean losses, and comparisons with the baseline by seed, in the order of the groups. known: {arm id: loss}."""
  by_seed = {
    label: {row.seeds: known.get(row.arm_id) for row in members if row.ended} for label, members in groups.items()
  }
  reference = by_seed.get(baseline, {})
  return [stats.interval(values.values()) for values in by_seed.values()], [
    None if label == baseline or apart[label] else comparison.compare(by_seed[label], reference, metric.unit)
    for label in groups
  ]


# ---------------------------------------------------------------------------------------------------------- text


def text(lines: Sequence[Line]) -> str:
  """The tables for a terminal, and under each how to read it."""
  metric = lines[0].metric if lines else LOSS
  other = BITS if metric is LOSS else LOSS
  titles = {LOSS: 'loss', BITS: 'bits/byte'}
  head = ('arm', 'n', titles[metric], 'difference', 'p', 'sign', 'verdict', 'gap', titles[other], 'accuracy')
  body = [
    (
      line.name,
      seeds_done(line),
      spread(line.loss),
      *compared(line),
      number(gap(line), '.4f'),
      number(line.mean(other.key), '.4f'),
      number(line.mean('accuracy'), '.1%'),
      short(line.mean('tokens')),
      short(line.mean('flops')),
      short(line.mean('parameters')),
      number(line.mean('seconds'), '.0f'),
    )
    for line in lines
  ]
  right = (1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 13)
  parts = [columns([(*head, 'tokens', 'FLOPs', 'params', 'seconds'), *body], right=right), note(lines)]
  if units(lines):
    titles_at = ('arm', *(cell for unit in units(lines) for cell in (f'at {controls.TITLES[unit]}', 'difference')))
    rows = [
      (line.name, *(cell for at in row for cell in (spread(at.loss), spread(at.difference, '+'))))
      for line, row in equal_cost(lines)
    ]
    parts += ['', columns([titles_at, *rows], right=range(1, len(titles_at)))]
  return '\n'.join([*parts, note_on_controls(lines)]).strip()


def compared(line: Line) -> tuple[str, str, str, str]:
  """The cells difference, p, sign and verdict: how an arm stands to the baseline."""
  c, verdict = line.comparison, line.verdict
  few = FEW_MARK * (c is not None and 0 < c.n < comparison.FEW and verdict.word in ('better', 'worse'))
  words = f'{verdict.word}{few}{f": {verdict.remark}" if verdict.remark else ""}'
  if c is None or not c.n:
    return '–', '–', '–', words
  p = c.p if line.p != line.p else line.p
  return spread(c.difference, '+'), '–' if p != p else stats.p_text(p), f'{c.agree}/{c.n}', words


def gap(line: Line) -> float:
  """The loss above the entropy of the data, in the unit of the table; NaN where that is not known."""
  nats = line.mean('gap')
  return nats if line.metric is LOSS else nats * line.mean(line.metric.key) / line.mean(LOSS.key)


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
  if not lines:
    return ''
  metric = lines[0].metric
  baseline = next((line.name for line in lines if line.is_baseline), '')
  words = [
    f'{metric.title[0].upper()}{metric.title[1:]} of held-out text, mean ± 95 % t-interval over n seeds;'
    ' gap: to the entropy of the data.'
  ]
  if metric is BITS:
    words.append('The tokenizers differ, so arms are compared in bits per byte: losses per token count other tokens.')
  if any(line.comparison is not None and line.comparison.n > 0 for line in lines):
    words.append(f'Differences to {baseline!r} are paired by seed; p: paired t-test; sign: seeds that agree with it.')
    if lines[0].comparisons > 1:
      words.append(f'p is corrected by Holm for {lines[0].comparisons} comparisons (intervals are not).')
    words.append(ASSUMED)
  if any(FEW_MARK in compared(line)[3] for line in lines):
    words.append(f'{FEW_MARK}: from fewer than {comparison.FEW} seeds, too few to check that.')
  return ' '.join(words)


def note_on_controls(lines: Sequence[Line]) -> str:
  """How to read the comparison at equal cost, a sentence a column; '' if there is none."""
  budgets = {unit: short(next(line.at_equal[unit].budget for line in lines)) for unit in units(lines)}
  sentences = {
    'tokens': 'At equal tokens: each arm’s loss when it had seen {}, the most that all arms reached.',
    'bytes': 'At equal bytes: each arm’s loss when it had seen {} bytes of text, the most that all arms reached.',
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
  """'3', '2 of 3', or '2 of 3, 1 diverged'."""
  n, of = line.loss.n, len(line.rows)
  diverged = sum(row.status == 'diverged' for row in line.rows)
  return f'{n}' if n == of else f'{n} of {of}' + f', {diverged} diverged' * (diverged > 0)


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
