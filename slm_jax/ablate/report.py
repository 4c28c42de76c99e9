"""The report of a workdir: one table as text, results.csv, plots, and report.html, a page that needs nothing else."""

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slm_jax.ablate import results, stats, table
from slm_jax.ablate import workdir as workdirs
from slm_jax.ablate.arms import shown
from slm_jax.ablate.results import Row
from slm_jax.ablate.table import Line, number, short
from slm_jax.ablate.workdir import Experiment
from slm_jax.files import write_text


def latest(workdir: Path) -> list[Row]:
  """The rows of the latest launch, parents first."""
  experiment = workdirs.read_experiment(workdir)
  rows = {row.arm_id: row for row in results.read(workdir)}
  return [rows[arm_id] for arm_id in experiment.latest] if experiment else list(rows.values())


def summary(workdir: Path, rows: Sequence[Row]) -> str:
  """The table and the experiment's answer, as text."""
  experiment = workdirs.read_experiment(workdir) or Experiment(workdir.name)
  text = table.text(table.lines(rows, experiment.baseline))
  return f'{text}\n\n{experiment.answer}' if experiment.answer else text


def publish(workdir: Path, everything: bool = False) -> str:
  """Writes results.csv (all arms), plots/ and report.html (of the latest launch, or everything); the table as text."""
  with workdirs.writing(workdir):
    rows = results.read(workdir)
    results.write_csv(workdir, rows)
    on_page = rows if everything else latest(workdir)
    path = workdir / 'report.html'
    write_text(path, html(workdir, on_page))
  others = len(rows) - len(on_page)
  also = f' (and {others} arms of earlier launches in results.csv)' if others else ''
  return f'{summary(workdir, on_page)}\n\n{path}{also}'


# ---------------------------------------------------------------------------------------------------------- the page


def html(workdir: Path, rows: Sequence[Row]) -> str:
  """The page; its plots are also written to plots/. All text is escaped by the template engine."""
  import jinja2  # heavy, as matplotlib is: a launch with nothing to do must not wait for them
  from markupsafe import Markup

  from slm_jax.ablate import plots

  experiment = workdirs.read_experiment(workdir) or Experiment(workdir.name)
  lines = table.lines(rows, experiment.baseline)
  engine = jinja2.Environment(
    loader=jinja2.PackageLoader('slm_jax.ablate'), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
  )
  drawn = plots.draw(workdir, lines)
  return engine.get_template('report.html').render(
    title=experiment.name,
    question=paragraphs(experiment.question),
    answer=paragraphs(experiment.answer),
    verdicts=[(line.name, line.verdict) for line in lines if line.difference and line.difference.n],
    baseline=next((line.name for line in lines if line.difference is None), ''),
    status=_status(rows),
    results=_results(lines),
    costs=_costs(lines),
    note=table.note(lines),
    legend=[
      (line.name, i % len(plots.COLOURS), i // len(plots.COLOURS) % len(plots.DASHES)) for i, line in enumerate(lines)
    ],
    plots=[(plot.title, Markup(plot.svg)) for plot in drawn],  # markup made by matplotlib, which escapes its text
    samples=[(line.name, _samples(workdir, line)) for line in lines],
    arms=[_arm(line.name, row) for line in lines for row in line.rows],
    environment=_environment(rows),
    now=datetime.datetime.now().astimezone().strftime('%Y-%m-%d %H:%M %Z'),
  )


def paragraphs(text: str) -> list[tuple[str, bool]]:
  """`[(text, whether its line breaks mean something)]`: indented and listed lines keep theirs."""
  found = []
  for block in text.strip().split('\n\n'):
    rows = [row.rstrip() for row in block.split('\n') if row.strip()]
    laid_out = any(row.startswith((' ', '-', '*', '|')) for row in rows)
    if rows:
      found.append(('\n'.join(rows), True) if laid_out else (' '.join(row.strip() for row in rows), False))
  return found


def _status(rows: Sequence[Row]) -> str:
  counts: dict[str, int] = {}
  for row in rows:
    counts[row.status] = counts.get(row.status, 0) + 1
  return f'{len(rows)} arms: ' + ', '.join(f'{n} {status}' for status, n in counts.items())


def _results(lines: Sequence[Line]) -> list[tuple[str, ...]]:
  return [
    (
      line.name,
      table.seeds_done(line),
      stats.digits(line.loss.mean, line.loss.half) if line.loss.n else '–',
      '–' if not (d := line.difference) or not d.n else stats.digits(d.mean, d.half, '+'),
      number(line.gap.mean, '.4f'),
      number(line.bits_per_byte, '.4f'),
      number(line.accuracy, '.1%'),
    )
    for line in lines
  ]


def _costs(lines: Sequence[Line]) -> list[tuple[str, ...]]:
  return [
    (
      line.name,
      short(line.parameters),
      short(line.tokens),
      short(line.flops),
      short(line.parent_flops),
      number(line.seconds, ',.0f'),
    )
    for line in lines
  ]


def _samples(workdir: Path, line: Line) -> list[tuple[str, str]]:
  """Those of the arm's first seed that is done."""
  return next((found for row in line.rows if (found := results.samples(workdir, row))), [])


def _arm(name: str, row: Row) -> dict[str, Any]:
  return {
    'name': name,
    'id': row.arm_id,
    'status': row.status,
    'seed': row.config.get('seed', '–'),
    'error': row.run.get('error') or '',
    'loss': number(row.summary.get('loss'), '.4f'),
    'diff': [(key, *('–' if v in (None, '') else shown(v) for v in values)) for key, values in row.diff.items()],
    'parents': row.parents,
    'command': row.command,
  }


def _environment(rows: Iterable[Row]) -> list[tuple[str, list[str]]]:
  """What the arms ran on; where they do not agree, every version is listed with the number of its arms."""
  runs = [row.run for row in rows if row.run]

  def said(of: Any) -> str:
    return of if isinstance(of, str) else json.dumps(of)

  def tally(values: Iterable[str]) -> list[str]:
    counts: dict[str, int] = {}
    for value in values:
      counts[value] = counts.get(value, 0) + 1
    return list(counts) if len(counts) < 2 else [f'{value} ({n} arms)' for value, n in counts.items()]

  def code(git: Mapping[str, Any]) -> str:
    return f'{git.get("commit") or "not in git"}{" with uncommitted changes" if git.get("dirty") else ""}'

  table = [
    ('Code', tally(code(run['git']) for run in runs if 'git' in run)),
    ('Device', tally(f'{run["devices"]} × {said(run["device_kind"])}' for run in runs if 'device_kind' in run)),
    ('Machine', tally(said(run['machine']) for run in runs if 'machine' in run)),
    ('Python', tally(said(run['python']) for run in runs if 'python' in run)),
    ('Packages', tally(', '.join(f'{k} {v}' for k, v in run['packages'].items()) for run in runs if 'packages' in run)),
  ]
  return [(name, values) for name, values in table if values]
