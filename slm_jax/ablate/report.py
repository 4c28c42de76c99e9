"""The reports of a workdir: tables as text, results.csv, plots, a page for every launch, and an index of the pages."""

from collections.abc import Sequence
from pathlib import Path

from slm_jax.ablate import controls, page, results, sections, table
from slm_jax.ablate import workdir as workdirs
from slm_jax.ablate.claims import EXPLORATORY
from slm_jax.ablate.comparable import LOSS
from slm_jax.ablate.results import Row
from slm_jax.ablate.table import Line
from slm_jax.ablate.workdir import Experiment, Launch
from slm_jax.files import write_text


def latest(workdir: Path) -> list[Row]:
  """The rows of the latest launch, parents first."""
  experiment = workdirs.known_experiment(workdir)
  return rows_of(results.read(workdir), experiment.latest) if experiment else results.read(workdir)


def rows_of(rows: Sequence[Row], launch: Launch) -> list[Row]:
  """Those of a launch, in its order."""
  by_id = {row.arm_id: row for row in rows}
  return [by_id[arm_id] for arm_id in launch.arms if arm_id in by_id]


def path_of(workdir: Path, launch: Launch) -> Path:
  """The report of a launch."""
  return workdir / 'reports' / f'{launch.key or "all"}.html'


def pages_of(workdir: Path, experiment: Experiment) -> list[Path]:
  """The pages that a report of the latest launch writes: its own, and report.html if that is this one."""
  launch = experiment.latest
  is_home = launch.whole or not any(each.whole for each in experiment.launches)
  return [path_of(workdir, launch), *([workdir / 'report.html'] if is_home else [])]


def summary(workdir: Path) -> str:
  """The tables and the answer of the latest launch, as text, and where its report is."""
  experiment = workdirs.known_experiment(workdir) or Experiment(workdir.name)
  rows = latest(workdir)
  lines = table.lines(rows, experiment.latest.baseline, results.curves(workdir, rows))
  return f'{_text(experiment.latest, lines)}\n\n{_shown_path(workdir, experiment.latest)}'


def _text(launch: Launch, lines: Sequence[Line]) -> str:
  faults = '\n'.join(results.faults(row for line in lines for row in line.rows))
  return '\n\n'.join(filter(None, [table.text(lines), faults, str(sections.answer_of(launch))]))


def publish(workdir: Path, everything: bool = False) -> str:
  """Writes results.csv (all arms) and the report of the latest launch, or of everything; the same as text.

  reports/KEY.html is the launch's own page, with plots/KEY/; report.html is that of the latest whole sweep, and
  index.html lists all.
  """
  experiment = workdirs.known_experiment(workdir) or Experiment(workdir.name)
  launch = experiment.latest._replace(key='all', claims=(), answer='') if everything else experiment.latest
  with workdirs.writing(workdir):
    rows = results.read(workdir)
    on_page = rows if everything else rows_of(rows, launch) if experiment.launches else rows
    curves = results.curves(workdir, on_page)
    lines = table.lines(on_page, launch.baseline, curves)
    metric = lines[0].metric if lines else LOSS
    results.write_csv(workdir, rows, controls.columns(controls.controls(on_page, curves, metric)))
    text = sections.render_launch(workdir, experiment.name, launch, lines, curves)
    own, *home = pages_of(workdir, experiment) if not everything else [path_of(workdir, launch)]
    write_text(own, text)
    for path in home:
      write_text(path, text.replace('href="../', 'href="'))  # the same, one folder above
    write_text(workdir / 'index.html', render_index(workdir, experiment, rows))
  others = len(rows) - len(on_page)
  also = f' (and {others} arms of earlier launches in results.csv)' if others else ''
  return f'{_text(launch, lines)}\n\n{_shown_path(workdir, launch)}{also}'


def _shown_path(workdir: Path, launch: Launch) -> Path:
  return workdir / 'report.html' if launch.whole and launch.key != 'all' else path_of(workdir, launch)


def render_index(workdir: Path, experiment: Experiment, rows: Sequence[Row]) -> str:
  """The page that lists the launches, the latest one first."""
  entries = []
  for launch in reversed(experiment.launches):
    path = path_of(workdir, launch)
    if path.exists():
      claims = sections.answer_of(launch).claims
      verdicts = [f'{claim.verdict}: {claim.what}' for claim in claims if claim.verdict != EXPLORATORY]
      about = 'the whole sweep' if launch.whole else 'a part of the sweep'
      status = page.status(rows_of(rows, launch))
      when = launch.when[:16].replace('T', ' ')
      entries.append((path.relative_to(workdir), about, status, when, launch.asked, verdicts))
  count = '1 launch' if len(entries) == 1 else f'{len(entries)} launches'
  return page.render('index.html', title=experiment.name, status=count, entries=entries)
