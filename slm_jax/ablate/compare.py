"""Two workdirs side by side: what became of the same arms after a change of code, data or settings.

Arms are matched by their names, and their runs by their seeds; all differences are B - A.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slm_jax.ablate import comparison, page, report, results, stats, table
from slm_jax.ablate import workdir as workdirs
from slm_jax.ablate.arms import show_apart
from slm_jax.ablate.comparable import LOSS, Metric, metric_of, why_apart
from slm_jax.ablate.comparison import Comparison, Verdict
from slm_jax.ablate.page import Cell, Grid
from slm_jax.ablate.results import Row
from slm_jax.ablate.stats import Interval
from slm_jax.ablate.sweep import SEEDS
from slm_jax.config import require
from slm_jax.files import write_text

Settings = list[tuple[str, str, str, str]]  # (key, in A, in B, the arms it is about)


class Pair(NamedTuple):
  """An arm that both have."""

  name: str
  rows: tuple[Sequence[Row], Sequence[Row]]
  metric: Metric  # of the losses; the same for all pairs
  losses: tuple[Interval, Interval]  # over all their seeds
  comparison: Comparison | None  # over the seeds that both have; None where `apart` says why there is none
  apart: str
  p: float  # adjusted for the number of pairs
  comparisons: int

  @property
  def difference(self) -> Interval:
    return self.comparison.difference if self.comparison else stats.interval([])

  @property
  def verdict(self) -> Verdict:
    if self.comparison is None:
      return Verdict('not compared', '', '', self.apart)
    return comparison.judge(self.comparison, self.p if self.p == self.p else None, self.comparisons)


def publish(a: Path, b: Path, everything: bool = False) -> str:
  """Writes B/compare.html; the same as text. Without `everything`, of the latest launches only."""
  ours = [results.read(where) if everything else report.latest(where) for where in (a, b)]
  found = pairs(*ours)
  known = [', '.join(map(repr, list(results.groups(rows))[:5])) or 'nothing' for rows in ours]
  require(len(found) > 0, f'{a} and {b}: no arm has the same name in both; there is {known[0]}; and {known[1]}')
  settings, path = (
    differing_settings(found, {row.arm_id: row.name for rows in ours for row in rows}),
    b / 'compare.html',
  )
  with workdirs.writing(b):
    write_text(path, html(a, b, found, settings, ours))
  parts = [_text(a, b, found), *_settings_text(settings), *(f'only in {w}: {n}' for w, n in unmatched(a, b, ours))]
  return '\n'.join([*parts, *(results.faults([*ours[0], *ours[1]])), '', str(path)])


def pairs(a: Sequence[Row], b: Sequence[Row]) -> list[Pair]:
  """The arms that both have, in the order of A."""
  in_a, in_b = results.groups(a), results.groups(b)
  names = [name for name in in_a if name in in_b]
  metric = metric_of([row for name in names for row in (*in_a[name], *in_b[name])])
  losses = [
    [{row.seeds: row.summary.get(metric.key) for row in of[name] if row.ended} for of in (in_a, in_b)] for name in names
  ]
  apart = [why_apart([*in_a[name], *in_b[name]]) for name in names]
  found = [
    None if why else comparison.compare(after, before, metric.unit)
    for why, (before, after) in zip(apart, losses, strict=True)
  ]
  ps = stats.holm([math.nan if each is None else each.p for each in found])
  comparisons = sum(not math.isnan(p) for p in ps)
  return [
    Pair(
      name,
      (in_a[name], in_b[name]),
      metric,
      (stats.interval(before.values()), stats.interval(after.values())),
      each,
      why,
      p,
      comparisons,
    )
    for name, (before, after), each, why, p in zip(names, losses, found, apart, ps, strict=True)
  ]


def differing_settings(found: Sequence[Pair], names: Mapping[str, str]) -> Settings:
  """The settings in which arms that were matched differ; of other arms by their names. names: {arm id: name}."""
  arms: dict[tuple[str, str, str], list[str]] = {}
  for pair in found:
    before, after = (of[0].config for of in pair.rows)
    if not (before and after):  # one of them is damaged
      continue
    for key in dict.fromkeys([*before, *after]):
      if before.get(key) == after.get(key):
        continue
      there, here = _said([config.get(key) for config in (before, after)], names)
      if key not in ('name', *SEEDS) and not key.startswith('run.') and there != here:
        arms.setdefault((key, there, here), []).append(pair.name)
  return [(*entry, 'all arms' if len(of) == len(found) else ', '.join(of)) for entry, of in arms.items()]


def _said(values: Sequence[Any], names: Mapping[str, str]) -> list[str]:
  texts = zip(values, show_apart(values), strict=True)
  return ['–' if v in (None, '') else names.get(v, v) if isinstance(v, str) else text for v, text in texts]


def unmatched(a: Path, b: Path, ours: Sequence[Sequence[Row]]) -> list[tuple[str, str]]:
  """`[(workdir, the arms that only it has)]`."""
  in_a, in_b = map(results.groups, ours)
  only = ((a, [name for name in in_a if name not in in_b]), (b, [name for name in in_b if name not in in_a]))
  return [(str(where), ', '.join(names)) for where, names in only if names]


# ---------------------------------------------------------------------------------------------------------- text


def _text(a: Path, b: Path, found: Sequence[Pair]) -> str:
  head = ('arm', 'n', 'loss in A', 'loss in B', 'B against A')
  body = [(p.name, str(p.difference.n), *map(table.spread, p.losses), str(p.verdict)) for p in found]
  return f'A: {a}\nB: {b}\n\n{table.columns([head, *body], right=(1, 2, 3))}\n{note(found)}\n'


def note(found: Sequence[Pair]) -> str:
  metric, many = found[0].metric, found[0].comparisons
  title = f'{metric.title[0].upper()}{metric.title[1:]}'
  words = [f'{title}, mean ± 95 % t-interval over all seeds; B − A by the n seeds that both have.']
  if metric is not LOSS:
    words.append('The tokenizers differ, so losses per token cannot be compared.')
  if many > 1:
    words.append(f'p is corrected by Holm for {many} comparisons (intervals are not).')
  return ' '.join([*words, table.ASSUMED])


def _settings_text(settings: Settings) -> list[str]:
  if not settings:
    return ['no setting differs']
  return ['settings that differ:', *(f'  {key}: {a} -> {b} ({arms})' for key, a, b, arms in settings)]


# ---------------------------------------------------------------------------------------------------------- page


def html(a: Path, b: Path, found: Sequence[Pair], settings: Settings, ours: Sequence[Sequence[Row]]) -> str:
  from slm_jax.ablate import plots

  names = [pair.name for pair in found]
  picture = plots.Picture(
    'compare',
    'Difference of each arm, B − A, and its 95 % interval',
    lambda ax: plots.differences(ax, names, [pair.difference for pair in found], found[0].metric),
    plots.height_of(names),
  )
  rows = [
    (
      Cell(pair.name, pair.name),
      Cell(str(pair.difference.n), pair.difference.n),
      *map(page.spread, pair.losses),
      page.spread(pair.difference, '+'),
      page.p_value(pair.p),
      page.number(pair.difference.detectable, '.2g'),
    )
    for pair in found
  ]
  return page.render(
    'compare.html',
    title=f'{b.resolve().name} against {a.resolve().name}',
    status=f'{len(found)} arms compared',
    a=str(a),
    b=str(b),
    verdicts=[(pair.name, str(pair.verdict)) for pair in found],
    differences=Grid(('arm', 'n', 'loss in A', 'loss in B', 'B − A', 'p', 'detectable'), rows),
    note=note(found),
    settings=settings,
    unmatched=[(f'only in {where}', [names]) for where, names in unmatched(a, b, ours)],
    plots=page.markup(plots.save(b / 'plots', [picture])),
    environments=[(str(where), page.environment(rows)) for where, rows in zip((a, b), ours, strict=True)],
  )
