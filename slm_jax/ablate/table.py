"""One line for each arm of an experiment, its repetitions over seeds together; and such lines as text."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from slm_jax.ablate import results, stats
from slm_jax.ablate.results import Row
from slm_jax.ablate.stats import Interval


class Line(NamedTuple):
  """One arm over its seeds. Losses in nats per token; all but `loss`, `gap` and `difference` are plain means."""

  name: str
  rows: Sequence[Row]
  loss: Interval
  gap: Interval  # to the entropy of the data, where that is known
  bits_per_byte: float
  accuracy: float
  tokens: float
  flops: float
  parent_flops: float  # of the arms that this one builds on
  parameters: float
  seconds: float
  difference: Interval | None  # of the loss to the baseline's, by seed; None for the baseline

  @property
  def verdict(self) -> str:
    return 'baseline' if self.difference is None else stats.verdict(self.difference)


def lines(rows: Iterable[Row], baseline: str) -> list[Line]:
  """A line for each arm, in the order of the rows; all are compared with the arm named `baseline`."""
  groups = results.groups(rows)
  if baseline not in groups:  # two arms of that name: the one that was launched first
    baseline = next((label for label, members in groups.items() if members[0].name == baseline), '')
  reference = _losses(groups.get(baseline, []))
  return [_line(label, members, None if label == baseline else reference) for label, members in groups.items()]


def _losses(rows: Sequence[Row]) -> dict:
  return {row.seeds: row.summary['loss'] for row in rows if row.summary}


def _line(name: str, rows: Sequence[Row], reference: dict | None) -> Line:
  def over_seeds(metric: str) -> Interval:
    return stats.interval(row.summary.get(metric) for row in rows)

  return Line(
    name=name,
    rows=rows,
    loss=over_seeds('loss'),
    gap=over_seeds('gap'),
    bits_per_byte=over_seeds('bits_per_byte').mean,
    accuracy=over_seeds('accuracy').mean,
    tokens=over_seeds('tokens').mean,
    flops=over_seeds('flops').mean,
    parent_flops=over_seeds('parent_flops').mean,
    parameters=over_seeds('parameters').mean,
    seconds=over_seeds('seconds').mean,
    difference=None if reference is None else stats.paired(_losses(rows), reference),
  )


# ---------------------------------------------------------------------------------------------------------- text


def text(lines: Sequence[Line]) -> str:
  """The table for a terminal, and under it what its comparisons come to."""
  head = (
    'arm',
    'n',
    'loss',
    'gap',
    'bits/byte',
    'accuracy',
    'tokens',
    'FLOPs',
    'params',
    'seconds',
    'against baseline',
  )
  body = [
    (
      line.name,
      seeds_done(line),
      stats.digits(line.loss.mean, line.loss.half),
      number(line.gap.mean, '.4f'),
      number(line.bits_per_byte, '.4f'),
      number(line.accuracy, '.1%'),
      short(line.tokens),
      short(line.flops),
      short(line.parameters),
      number(line.seconds, '.0f'),
      line.verdict if line.difference is None or line.difference.n else '–',
    )
    for line in lines
  ]
  return f'{columns([head, *body], right=range(1, 10))}\n{note(lines)}'


def note(lines: Sequence[Line]) -> str:
  """How to read the table."""
  baseline = next((line.name for line in lines if line.difference is None), '')
  compared = sum(line.difference is not None and line.difference.n > 0 for line in lines)
  words = 'loss in nats per token, mean ± 95 % t-interval over n seeds; gap: to the entropy of the data'
  if compared:
    words += f'; differences to {baseline!r} are paired by seed'
  if compared > 1:
    words += f'; {compared} comparisons, not corrected for their number'
  return words + '.'


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
