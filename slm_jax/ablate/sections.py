"""The page of one launch: what each of its sections shows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_jax.ablate import controls, page, results, table
from slm_jax.ablate.arms import show_apart, shown
from slm_jax.ablate.claims import EXPLORATORY, Answer, Decided
from slm_jax.ablate.comparable import BITS, LOSS, Metric
from slm_jax.ablate.page import Cell, Grid
from slm_jax.ablate.results import Point, Row
from slm_jax.ablate.table import Line
from slm_jax.ablate.workdir import Launch

if TYPE_CHECKING:
  from slm_jax.ablate.plots import Plot

TITLES = {LOSS: 'loss', BITS: 'bits/byte'}

# What it took: (title, metric of the summaries, how it is shown; '' as 1.23M). Columns without a number are left out.
WORK = (
  ('parameters', 'parameters', ''),
  ('of them zero', 'zeros', ''),
  ('tokens', 'tokens', ''),
  ('FLOPs', 'flops', ''),
  ('FLOPs of its parents', 'parent_flops', ''),
  ('pipeline FLOPs', 'pipeline_flops', ''),
  ('hardware FLOPs', 'hardware_flops', ''),
)
COSTS = (
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

# What a reader wants to know of the base first: (title, settings, of which the first that is set counts).
BASE = (
  ('data', ('data.sources',)),
  ('tokenizer', ('data.tokenizer_file', 'data.tokenizer')),
  ('tokens in the vocabulary', ('model.vocab_size',)),
  ('sequence length, tokens', ('data.seq_len',)),
  ('batch, sequences', ('data.batch_size',)),
  ('steps', ('train.steps',)),
  ('optimiser', ('optim.name',)),
  ('learning rate', ('optim.learning_rate',)),
  ('schedule', ('optim.schedule',)),
  ('warm-up, steps', ('optim.warmup',)),
  ('transforms', ('transforms',)),
)


def answer_of(launch: Launch) -> Answer:
  """What the experiment's own report said, as it was recorded."""
  return Answer(launch.answer, tuple(Decided(**claim) for claim in launch.claims))


def render_launch(
  workdir: Path, name: str, launch: Launch, lines: Sequence[Line], curves: Mapping[str, Sequence[Point]]
) -> str:
  """The page; its plots are also written to plots/KEY/."""
  from slm_jax.ablate import plots

  rows, answer = [row for line in lines for row in line.rows], answer_of(launch)
  training = results.training_curves(workdir, rows)
  drawn = plots.draw(workdir / 'plots' / (launch.key or 'all'), lines, curves, training)
  first, others = message(drawn)
  question, *more = page.paragraphs(launch.question) or [('', False)]
  titles = results.name_rows(rows)
  return page.render(
    'report.html',
    title=name,
    question=[question],
    more=more,
    asked=launch.asked,
    claims=[claim for claim in answer.claims if claim.verdict != EXPLORATORY],
    exploratory=[str(claim) for claim in answer.claims if claim.verdict == EXPLORATORY],
    answer=page.paragraphs(answer.text),
    message=page.markup(first),
    baseline=next((line.name for line in lines if line.is_baseline), ''),
    status=page.status(rows),
    compared=_compared(lines),
    results=_results(lines),
    note=table.note(lines),
    notices=_notices(rows),
    taught=_taught(lines),
    at_equal_cost=_at_equal_cost(lines),
    note_on_controls=table.note_on_controls(lines),
    work=_costs(lines, WORK),
    costs=_costs(lines, COSTS),
    energy=sorted({str(row.summary['energy_source']) for row in rows if row.summary.get('energy_source')}),
    legend=[(line.name, *plots.style(i)) for i, line in enumerate(lines)],
    swept=page.markup(plot for plot in others if not plot.by_arm),
    plots=page.markup(plot for plot in others if plot.by_arm),
    samples=[(line.name, _samples(workdir, line)) for line in lines],
    base=_base(lines),
    arms=[_arm(titles[row.arm_id], row) for row in rows],
    environment=page.environment(rows),
  )


def message(drawn: 'Sequence[Plot]') -> 'tuple[list[Plot], list[Plot]]':
  """`([the plot that answers the question best], the others)`: what a sweep varies, or differences to the baseline."""
  order = sorted(range(len(drawn)), key=lambda i: (drawn[i].by_arm, drawn[i].name != 'differences', i))
  return [drawn[i] for i in order[:1]], [plot for i, plot in enumerate(drawn) if i not in order[:1]]


def _compared(lines: Sequence[Line]) -> Grid:
  """How each arm stands to the baseline."""
  rows = []
  for line in lines:
    c, (difference, p, sign, verdict) = line.comparison, table.compared(line)
    rows.append(
      (
        Cell(line.name, line.name),
        Cell(table.seeds_done(line), line.loss.n),
        page.spread(line.loss),
        Cell(difference, c.difference.mean if c and c.n else ''),
        Cell(p, line.p if line.p == line.p else ''),
        Cell(sign, c.agree if c and c.n else ''),
        page.number(c.difference.detectable if c else float('nan'), '.2g'),
        Cell(verdict, verdict, words=True),
      )
    )
  return Grid(('arm', 'n', TITLES[_metric(lines)], 'difference', 'p', 'sign', 'detectable', 'verdict'), rows)


def _results(lines: Sequence[Line]) -> Grid:
  """What was measured besides; columns without a number are left out."""
  other = BITS if _metric(lines) is LOSS else LOSS
  columns = [('gap', '.4f'), (other.key, '.4f'), ('perplexity', ',.4g'), ('accuracy', '.1%'), ('exact_match', '.1%')]
  found: list[tuple[str, list[Cell]]] = []
  for metric, spec in [*columns, ('ece', '.1%')]:
    means = [table.gap(line) if metric == 'gap' else line.mean(metric) for line in lines]
    if any(mean == mean for mean in means):
      title = TITLES[other] if metric == other.key else metric.replace('ece', 'calibration error').replace('_', ' ')
      found.append((title, [page.number(mean, spec) for mean in means]))
  rows = [(Cell(line.name, line.name), *(cells[i] for _, cells in found)) for i, line in enumerate(lines)]
  return Grid(('arm', *(title for title, _ in found)), rows)


def _metric(lines: Sequence[Line]) -> Metric:
  return lines[0].metric if lines else LOSS


def _notices(rows: Sequence[Row]) -> list[tuple[str, str]]:
  """What changed the text that was read, and how many arms it was so for."""
  counts: dict[str, int] = {}
  for row in rows:
    for notice in row.run.get('notices') or ():
      counts[str(notice)] = counts.get(str(notice), 0) + 1
  return [(notice, '' if n == len(rows) else f'{n} of {len(rows)} arms') for notice, n in counts.items()]


def _base(lines: Sequence[Line]) -> dict[str, Any]:
  """The configuration of the baseline's first run: the facts that matter, and all of it."""
  line = next((line for line in lines if line.is_baseline), lines[0] if lines else None)
  if line is None or not line.rows[0].config:
    return {}
  config, varied = line.rows[0].config, set(results.differing([row for line in lines for row in line.rows]))

  def said(key: str) -> str:
    return shown(config[key]) + (' (differs between arms)' if key in varied else '')

  facts = []
  for title, keys in BASE:
    if key := next((key for key in keys if config.get(key)), None):
      facts.append((title, [said(key)]))
  size = line.mean('parameters')
  facts.insert(0, ('parameters', [table.short(size)]))
  return {'name': line.name, 'facts': facts, 'settings': [(key, [said(key)]) for key in config if key != 'name']}


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


def _costs(lines: Sequence[Line], wanted: Sequence[tuple[str, str, str]]) -> Grid:
  columns, of_parents = [], table.have_parents(lines)
  for title, metric, spec in wanted:
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


def _arm(title: str, row: Row) -> dict[str, Any]:
  return {
    'title': title,
    'id': row.arm_id,
    'status': row.status,
    'error': row.run.get('error') or '',
    'loss': table.number(row.summary.get('loss'), '.4f'),
    'diff': [
      (key, *('–' if v in (None, '') else text for v, text in zip(values, show_apart(values), strict=True)))
      for key, values in row.diff.items()
    ],
    'parents': row.parents,
    'command': row.command,
  }
