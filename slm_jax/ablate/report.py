"""The report of a workdir: tables as text, results.csv, plots, and report.html, a page that needs nothing else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slm_jax.ablate import controls, page, results, table
from slm_jax.ablate import workdir as workdirs
from slm_jax.ablate.arms import shown
from slm_jax.ablate.page import Cell, Grid
from slm_jax.ablate.results import Point, Row
from slm_jax.ablate.table import Line
from slm_jax.ablate.workdir import Experiment
from slm_jax.files import write_text

# What it took: (title, metric of the summaries, how it is shown; '' as 1.23M). Columns without a number are left out.
COSTS = (
  ('parameters', 'parameters', ''),
  ('of them zero', 'zeros', ''),
  ('tokens', 'tokens', ''),
  ('FLOPs', 'flops', ''),
  ('FLOPs of its parents', 'parent_flops', ''),
  ('pipeline FLOPs', 'pipeline_flops', ''),
  ('hardware FLOPs', 'hardware_flops', ''),
  ('seconds', 'seconds', ',.0f'),
  ('goodput', 'goodput', '.0%'),
  ('peak memory, bytes', 'peak_bytes', ''),
  ('chip-hours', 'chip_hours', ',.3g'),
  ('dollars', 'dollars', ',.2f'),
  ('joules, measured', 'joules', ''),
  ('joules, estimated', 'joules_estimated', ''),
)

# How students stand to their teachers (slm_jax/distill/{judge,crossed}.py), as metrics of the summaries: those that
# come with their intervals, and those of which the teacher has one of its own, beside it.
TAUGHT = {
  'KL(p‖q)': 'kl',
  'KL(q‖p)': 'reverse_kl',
  'on own text': 'rollout_kl',
  'agreement': 'agreement',
  'KL of chunks': 'chunk_kl',
}
BOTH = {'loss': '.3f', 'entropy': '.3f', 'ece': '.1%', 'bits_per_byte': '.3f'}


def latest(workdir: Path) -> list[Row]:
  """The rows of the latest launch, parents first."""
  experiment = workdirs.known_experiment(workdir)
  rows = {row.arm_id: row for row in results.read(workdir)}
  return [rows[arm_id] for arm_id in experiment.latest] if experiment else list(rows.values())


def summary(workdir: Path, rows: Sequence[Row]) -> str:
  """The tables and the experiment's answer, as text."""
  experiment = workdirs.known_experiment(workdir) or Experiment(workdir.name)
  return _text(experiment, table.lines(rows, experiment.baseline, results.curves(workdir, rows)))


def _text(experiment: Experiment, lines: Sequence[Line]) -> str:
  faults = '\n'.join(results.faults(row for line in lines for row in line.rows))
  return '\n\n'.join(filter(None, [table.text(lines), faults, experiment.answer]))


def publish(workdir: Path, everything: bool = False) -> str:
  """Writes results.csv (all arms), plots/ and report.html (of the latest launch, or everything); the tables as text."""
  experiment = workdirs.known_experiment(workdir) or Experiment(workdir.name)
  path = workdir / 'report.html'
  with workdirs.writing(workdir):
    rows = results.read(workdir)
    on_page = rows if everything else latest(workdir)
    curves = results.curves(workdir, on_page)
    lines = table.lines(on_page, experiment.baseline, curves)
    results.write_csv(workdir, rows, controls.columns(controls.controls(on_page, curves)))
    write_text(path, html(workdir, experiment, lines, curves))
  others = len(rows) - len(on_page)
  also = f' (and {others} arms of earlier launches in results.csv)' if others else ''
  return f'{_text(experiment, lines)}\n\n{path}{also}'


# ---------------------------------------------------------------------------------------------------------- the page


def html(workdir: Path, experiment: Experiment, lines: Sequence[Line], curves: Mapping[str, Sequence[Point]]) -> str:
  """The page; its plots are also written to plots/."""
  from slm_jax.ablate import plots

  rows = [row for line in lines for row in line.rows]
  drawn = plots.draw(workdir, lines, curves)
  return page.render(
    'report.html',
    title=experiment.name,
    question=page.paragraphs(experiment.question),
    answer=page.paragraphs(experiment.answer),
    verdicts=[(line.name, line.verdict) for line in lines if line.difference and line.difference.n],
    baseline=next((line.name for line in lines if line.difference is None), ''),
    status=page.status(rows),
    results=_results(lines),
    note=table.note(lines),
    taught=_taught(lines),
    at_equal_cost=_at_equal_cost(lines),
    note_on_controls=table.note_on_controls(lines),
    costs=_costs(lines),
    energy=sorted({str(row.summary['energy_source']) for row in rows if row.summary.get('energy_source')}),
    legend=[(line.name, *plots.style(i)) for i, line in enumerate(lines)],
    swept=page.markup(plot for plot in drawn if not plot.by_arm),
    plots=page.markup(plot for plot in drawn if plot.by_arm),
    samples=[(line.name, _samples(workdir, line)) for line in lines],
    arms=[_arm(line.name, row) for line in lines for row in line.rows],
    environment=page.environment(rows),
  )


def _results(lines: Sequence[Line]) -> Grid:
  head = ('arm', 'n', 'loss', 'difference', 'p', 'detectable', 'gap', 'bits/byte', 'accuracy')
  rows = []
  for line in lines:
    d = line.difference
    compared = (page.spread(d, '+'), page.p_value(line.p), page.number(d.detectable if d else float('nan'), '.2g'))
    means = [page.number(line.mean(metric), spec) for metric, spec in (('gap', '.4f'), ('bits_per_byte', '.4f'))]
    n, loss = Cell(table.seeds_done(line), line.loss.n), page.spread(line.loss)
    rows.append((Cell(line.name, line.name), n, loss, *compared, *means, page.number(line.mean('accuracy'), '.1%')))
  return Grid(head, rows)


def _taught(lines: Sequence[Line]) -> Grid:
  """A row for each arm that was compared with a teacher; what none of them has is no column."""

  def some(metric: str) -> bool:
    return any(line.interval(metric).n for line in lines)

  alone = {title: metric for title, metric in TAUGHT.items() if some(metric)}
  both = {metric: spec for metric, spec in BOTH.items() if some(f'teacher_{metric}')}
  rows = []
  for line in lines:
    if any(line.interval(metric).n for metric in (*alone.values(), *(f'teacher_{metric}' for metric in both))):
      spreads = [page.spread(line.interval(metric)) for metric in alone.values()]
      pairs = [(line.mean(metric), line.mean(f'teacher_{metric}'), spec) for metric, spec in both.items()]
      means = [Cell(f'{table.number(own, spec)} ({table.number(its, spec)})', own) for own, its, spec in pairs]
      rows.append((Cell(line.name, line.name), *spreads, *means))
  return Grid(('arm', *alone, *(metric.replace('ece', 'ECE').replace('_per_', '/') for metric in both)), rows)


def _at_equal_cost(lines: Sequence[Line]) -> Grid:
  units = table.units(lines)
  head = ('arm', *(title for unit in units for title in (f'at {controls.TITLES[unit]}', 'difference')))
  rows = []
  for line, row in table.equal_cost(lines):
    spreads = ((page.spread(at.loss), page.spread(at.difference, '+')) for at in row)
    rows.append((Cell(line.name, line.name), *(cell for pair in spreads for cell in pair)))
  return Grid(head, rows)


def _costs(lines: Sequence[Line]) -> Grid:
  columns, of_parents = [], table.have_parents(lines)
  for title, metric, spec in COSTS:
    means = [_mean(line, metric) for line in lines]
    if any(mean == mean for mean in means) and (of_parents or metric not in ('parent_flops', 'pipeline_flops')):
      columns.append((title, [page.number(mean, spec) if spec else page.short(mean) for mean in means]))
  rows = [(Cell(line.name, line.name), *(cells[i] for _, cells in columns)) for i, line in enumerate(lines)]
  return Grid(('arm', *(title for title, _ in columns)), rows)


def _mean(line: Line, metric: str) -> float:
  return line.mean('flops') + line.mean('parent_flops') if metric == 'pipeline_flops' else line.mean(metric)


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
    'loss': table.number(row.summary.get('loss'), '.4f'),
    'diff': [(key, *('–' if v in (None, '') else shown(v) for v in values)) for key, values in row.diff.items()],
    'parents': row.parents,
    'command': row.command,
  }
