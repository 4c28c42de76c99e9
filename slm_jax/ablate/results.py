"""A workdir as one table: a row an arm, read from the files that the runs left; and the numbers behind it.

What runs write is only ever added to, so that this needs no database: `read` a row an arm, `curve` its evaluations,
`table` every number of every arm as one long pandas table.
"""

import collections
import csv
import hashlib
import io
import json
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from slm_jax import metrics, run_files
from slm_jax.ablate import workdir as workdirs
from slm_jax.config import ConfigError, to_install
from slm_jax.files import warn_once, write_text

if TYPE_CHECKING:
  import pandas

METRICS = (
  *('loss', 'gap', 'floor', 'bits_per_byte', 'perplexity', 'accuracy', 'ece'),
  *('tokens', 'flops', 'parent_flops', 'parameters', 'seconds'),
)
NEEDED = ('loss', 'tokens')  # of a line about a step, for a curve
NO_COLUMN = ('name', 'seed', 'data.content')  # columns of their own, or derived from others


class Row(NamedTuple):
  """What is known of one arm."""

  arm_id: str
  name: str
  group: str  # shared by the repetitions over seeds, see `arms.Arm`
  # done, failed, diverged, preempted, running; missing: never started; blocked: a parent is not done; damaged: a file
  # cannot be trusted, and no number of this arm is shown
  status: str
  config: Mapping[str, Any]  # flat
  summary: Mapping[str, Any]  # final metrics; empty unless done
  run: Mapping[str, Any]  # run.json: versions, hardware, times, error; of a damaged arm, what is wrong as the error
  parents: tuple[str, ...] = ()  # arm ids
  diff: Mapping[str, Sequence[Any]] = {}  # against the base: {dotted key: (there, here)}
  command: str = ''

  @property
  def seeds(self) -> Hashable:
    """What must be equal for two rows to be a pair."""
    return self.config.get('seed'), self.config.get('data.seed')

  @property
  def ended(self) -> bool:
    """Whether a launch would not go on with it by itself: it has its result, even if that is none."""
    return self.status in ('done', 'diverged', 'failed')

  @property
  def tokenizer(self) -> str:
    """What must be equal for two losses per token to count the same tokens."""
    return str(self.summary.get('tokenizer') or _digest(self.config, _TOKENS))

  @property
  def held_out(self) -> str:
    """What must be equal for two losses to be of the same text."""
    return str(self.summary.get('held_out') or _digest(self.config, _EVALUATED))


# Of runs of format 1, which did not say what text they were evaluated on: the settings that it followed from.
_TOKENS = (
  *('data.content', 'data.tokenizer', 'data.vocab_size', 'data.documents', 'data.errors', 'data.text_field'),
  'data.valid_fraction',
)
_EVALUATED = (*_TOKENS, 'data.seq_len', 'data.packing', 'data.prompt_end', 'eval.sequences')


def _digest(config: Mapping[str, Any], keys: Sequence[str]) -> str:
  settings = {key: config.get(key) for key in keys}
  if settings['data.tokenizer'] == 'bytes':
    settings['data.vocab_size'] = None
    if keys is _TOKENS:
      return 'bytes'
  return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class Point(NamedTuple):
  """One evaluation on the way."""

  step: int
  tokens: float
  flops: float | None
  loss: float
  bits_per_byte: float = math.nan
  bytes: float | None = None  # of training text


def read(workdir: Path) -> list[Row]:
  """Every arm of the workdir, in the order of their first launch. A damaged experiment.json is told, and left out."""
  experiment = workdirs.known_experiment(workdir)
  entries = dict(experiment.arms) if experiment else {}
  for path in sorted((workdir / 'arms').glob('*/config.json')):
    entries.setdefault(path.parent.name, {})
  rows = [_row(workdir, arm_id, entry) for arm_id, entry in entries.items()]
  done = {row.arm_id for row in rows if row.status == 'done'}
  return [
    row._replace(status='blocked') if row.status == 'missing' and not done.issuperset(row.parents) else row
    for row in rows
  ]


def _row(workdir: Path, arm_id: str, entry: Mapping[str, Any]) -> Row:
  folder = workdirs.folder(workdir, arm_id)
  config, of_config = run_files.read_config(folder)
  run, of_run = run_files.read_run(folder)
  done = (folder / 'DONE').exists()
  fault, status = damage(folder, of_config, of_run, done), run.get('status', 'missing')
  return Row(
    arm_id=arm_id,
    name=entry.get('name') or config.get('name') or arm_id,
    group=entry.get('group', arm_id),
    status='damaged' if fault else 'done' if done else {'nan': 'diverged'}.get(status, status),
    config=config,
    summary=run.get('summary', {}) if done and not fault else {},
    run={**run, 'error': fault} if fault else run,
    parents=tuple(entry.get('parents', ())),
    diff=entry.get('diff', {}),
    command=entry.get('command', ''),
  )


def damage(folder: Path, of_config: str, of_run: str, done: bool) -> str:
  """What is wrong with the files of an arm, and what mends it; '' if nothing is."""
  if of_run:
    return f'{folder / "run.json"}: {of_run}; ' + (run_files.mend(folder) if done else 'launch again')
  return f'{folder / "config.json"}: {of_config}; launch again, which writes it anew' if of_config else ''


def faults(rows: Iterable[Row]) -> list[str]:
  """A line for each arm that no table shows, since a file of it is damaged."""
  return [f'damaged, and left out: {row.name}: {row.run["error"]}' for row in rows if row.status == 'damaged']


def groups(rows: Iterable[Row]) -> dict[str, list[Row]]:
  """Rows by arm, repetitions over seeds together, one for each seed.

  Arms of two names stay apart, and so do two different arms of one name (from two launches). Where only the parents'
  seeds tell two rows apart, a second line has the later one, with others of those parents.
  """
  by_arm: dict[tuple[str, str], list[list[Row]]] = {}
  for row in rows:
    lines = by_arm.setdefault((row.name, row.group), [])
    free = [line for line in lines if all(other.seeds != row.seeds for other in line)]
    akin = [line for line in free if any(other.parents == row.parents for other in line)]
    if free:
      (akin or free)[0].append(row)
    else:
      lines.append([row])
  names = [name for name, _ in by_arm]
  found = {}
  for (name, group), lines in by_arm.items():
    for line in lines:
      told = line[0].arm_id if len(lines) > 1 else group
      found[name if len(lines) == names.count(name) == 1 else f'{name} ({told[:6]})'] = line
  return found


def name_rows(rows: Sequence[Row]) -> dict[str, str]:
  """`{arm id: what tells a run apart from the others}`: its name, its seeds, its parents' seeds or, at last, its id."""
  parts = [
    lambda row: row.name,
    lambda row: f'seed {row.config.get("seed", "–")}',
    lambda row: f'data.seed {row.config.get("data.seed", "–")}',
    lambda row: row.arm_id,
  ]
  titles = {row.arm_id: [part(row) for part in parts[:2]] for row in rows}
  for part in parts[2:]:
    counts = collections.Counter(map(tuple, titles.values()))
    titles = {
      row.arm_id: [*titles[row.arm_id], part(row)] if counts[tuple(titles[row.arm_id])] > 1 else titles[row.arm_id]
      for row in rows
    }
  return {arm_id: ', '.join(title) for arm_id, title in titles.items()}


# ------------------------------------------------------------------------------------------------------ results.csv


def differing(rows: Sequence[Row]) -> list[str]:
  """The configuration keys in which the rows are not all the same."""
  keys = dict.fromkeys(key for row in rows for key in row.config if key not in NO_COLUMN)
  return [key for key in keys if len({json.dumps(row.config.get(key)) for row in rows if row.config}) > 1]


def write_csv(workdir: Path, rows: Sequence[Row], controls: Mapping[str, Mapping[str, float]] | None = None) -> Path:
  """results.csv: identity, what differs, final metrics, losses at equal cost; replaced as a whole.

  controls: `{column: {arm id: loss}}`, see `controls.columns`.
  """
  keys, controls = differing(rows), controls or {}
  more = sorted({key for row in rows for key in row.summary} - set(METRICS))
  text = io.StringIO()
  out = csv.writer(text, lineterminator='\n')
  out.writerow(['arm_id', 'name', 'seed', 'status', *keys, *METRICS, *more, *controls, 'error'])
  for row in rows:
    settings = [_cell(row.config.get(key)) for key in keys]
    numbers = [_cell(row.summary.get(key)) for key in (*METRICS, *more)]
    numbers += [losses.get(row.arm_id) for losses in controls.values()]
    error = str(row.run.get('error') or '')
    out.writerow([row.arm_id, row.name, _cell(row.config.get('seed')), row.status, *settings, *numbers, error])
  path = workdir / 'results.csv'
  write_text(path, text.getvalue())
  return path


def _cell(value: Any) -> Any:
  return json.dumps(value) if isinstance(value, (list, dict, bool)) else value


# ------------------------------------------------------------------------------------------- metrics and samples


def lines(workdir: Path, row: Row) -> list[dict[str, Any]]:
  """All lines of an arm's metrics.jsonl but damaged ones."""
  return list(metrics.read(workdirs.folder(workdir, row.arm_id) / 'metrics.jsonl', warn_once))


def curve(workdir: Path, row: Row) -> list[Point]:
  """The evaluations of an arm on the text of its last one.

  FLOPs (known at its end) are spread over its steps; a teacher's part is in them. Bytes are spread over its tokens.
  """
  tokens, flops, n_bytes = (row.summary.get(key) or math.nan for key in ('tokens', 'flops', 'bytes'))
  steps = row.config.get('train.steps') or math.nan
  lined = [line for line in lines(workdir, row) if line['kind'] == 'eval' and line.get('tokens') is not None]
  evaluated = row.summary.get('tokens_evaluated') or (lined[-1].get('tokens_evaluated') if lined else None)
  return [
    Point(
      line['step'],
      line['tokens'],
      _known(flops / steps * line['step']),
      line['loss'],
      line.get('bits_per_byte', math.nan),
      _known(n_bytes / tokens * line['tokens']),
    )
    for line in lined
    if line['loss'] is not None and line.get('tokens_evaluated', evaluated) == evaluated
  ]


def _known(value: float) -> float | None:
  return None if math.isnan(value) else value


def curves(workdir: Path, rows: Iterable[Row]) -> dict[str, list[Point]]:
  """`{arm id: its evaluations}` of the rows that have any."""
  found = {row.arm_id: curve(workdir, row) for row in rows}
  return {arm_id: points for arm_id, points in found.items() if points}


def training_curves(workdir: Path, rows: Iterable[Row]) -> dict[str, list[Point]]:
  """`{arm id: its training loss}`, each point the mean of a hundredth of the run; of the rows that have any."""
  found = {}
  for row in rows:
    logged = [line for line in lines(workdir, row) if line['kind'] == 'train' and None not in map(line.get, NEEDED)]
    size = -(-len(logged) // 100)
    n_bytes, tokens = row.summary.get('bytes'), row.summary.get('tokens')
    a_token = n_bytes / tokens if n_bytes and tokens else None
    points = []
    for part in (logged[i : i + size] for i in range(0, len(logged), size)) if logged else ():
      loss, seen = sum(line['loss'] for line in part) / len(part), part[-1]['tokens']
      bits = loss / math.log(2) / a_token if a_token else math.nan
      points.append(Point(part[-1]['step'], seen, None, loss, bits, a_token and a_token * seen))
    if points:
      found[row.arm_id] = points
  return found


def samples(workdir: Path, row: Row) -> list[tuple[str, str]]:
  """`[(prompt, continuation)]` written at the end of the run."""
  folder = workdirs.folder(workdir, row.arm_id)
  found, fault = run_files.read_samples(folder)
  if fault:
    warn_once(f'{folder / "samples.json"}: damaged ({fault}), and left out')
  return [(sample['prompt'], sample['text']) for sample in found]


def table(workdir: Path) -> 'pandas.DataFrame':
  """Every number of every arm, one a line: to be grouped, pivoted and plotted (extra `tables`).

      columns   arm_id, name, group, seed, data.seed; every setting in which the arms differ; kind, step, metric, value
      kind      'train' and 'eval', from metrics.jsonl; 'final', from the summary of an arm that is done

  value: float64, NaN where none could be written. For example, the last loss by learning rate and width:

      last = t[(t.kind == 'final') & (t.metric == 'loss')]
      last.pivot_table('value', 'optim.learning_rate', 'model.d_model', aggfunc=['mean', 'std', 'count'])
  """
  try:
    import pandas
  except ImportError:
    raise ConfigError(f'results.table: needs the extra: {to_install("tables")}') from None

  rows = read(workdir)
  keys = [key for key in differing(rows) if key != 'data.seed']
  records = []
  for row in rows:
    arm = (row.arm_id, row.name, row.group, row.config.get('seed'), row.config.get('data.seed'))
    settings = [_cell(row.config.get(key)) for key in keys]
    records += [(*arm, *settings, *number) for number in _numbers(workdir, row)]
  head = ['arm_id', 'name', 'group', 'seed', 'data.seed', *keys, 'kind', 'step', 'metric', 'value']
  return pandas.DataFrame.from_records(records, columns=head).astype({'value': 'float64'})


def _numbers(workdir: Path, row: Row) -> list[tuple[str, int | None, str, Any]]:
  """`(kind, step, metric, value)` of everything that an arm measured."""
  found = [(line['kind'], line['step'], *item) for line in lines(workdir, row) for item in line.items()]
  found += [('final', row.summary.get('steps'), *item) for item in row.summary.items()]
  return [entry for entry in found if entry[2] not in ('kind', 'step') and not isinstance(entry[3], (str, list, dict))]
