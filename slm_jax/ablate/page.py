"""HTML pages that need nothing else: templates, tables whose columns can be sorted, and one script that may run.

All text is escaped by the template engine. Beyond that, a page forbids whatever does not belong to it by a
Content-Security-Policy: nothing is fetched, and of scripts only ours runs, known by its hash.
"""

import base64
import datetime
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from slm_jax.ablate import stats, table
from slm_jax.ablate.results import Row
from slm_jax.ablate.stats import Interval

if TYPE_CHECKING:
  from slm_jax.ablate.plots import Plot


class Cell(NamedTuple):
  text: str
  key: str | float = ''  # what a column is sorted by; cells without one come last
  words: bool = False  # a sentence, which may be broken into lines


def spread(value: Interval | None, sign: str = '') -> Cell:
  """A mean and its interval."""
  return Cell(table.spread(value, sign), value.mean) if value is not None and value.n else Cell('–')


def number(value: float, spec: str) -> Cell:
  return Cell(table.number(value, spec), '' if value != value else value)


def short(value: float) -> Cell:
  return Cell(table.short(value), '' if value != value else value)


def p_value(p: float) -> Cell:
  return Cell('–') if p != p else Cell(stats.p_text(p), p)


class Grid(NamedTuple):
  """A table: titles, and rows of which the first cell is the arm's name."""

  head: Sequence[str]
  rows: Sequence[Sequence[Cell]]


def render(template: str, **values: Any) -> str:
  """The page, from a template of this package; values are text, grids, plots and lists of them."""
  import jinja2  # heavy, as matplotlib is: a launch with nothing to do must not wait for them
  from markupsafe import Markup

  loader = jinja2.PackageLoader('slm_jax.ablate')
  engine = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
  script, _, _ = loader.get_source(engine, 'sort.js')
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  now = datetime.datetime.now().astimezone().strftime('%Y-%m-%d %H:%M %Z')
  return engine.get_template(template).render(script=Markup(script), script_hash=digest, now=now, **values)


def markup(plots: Iterable['Plot']) -> list[tuple[str, Any]]:
  """`[(title, SVG element)]`: markup made by matplotlib, which escapes its text."""
  from markupsafe import Markup

  return [(plot.title, Markup(plot.svg)) for plot in plots]


def paragraphs(text: str) -> list[tuple[str, bool]]:
  """`[(text, whether its line breaks mean something)]`: listed lines keep theirs; tables are indented by four."""
  found = []
  for block in text.strip('\n').split('\n\n'):
    rows = [row.rstrip() for row in block.split('\n') if row.strip()]
    laid_out = any(row.startswith((' ', '-', '*', '|')) for row in rows)
    for _, part in itertools.groupby(rows, lambda row: row.startswith('    ')):
      its = list(part)
      found.append(('\n'.join(its), True) if laid_out else (' '.join(row.strip() for row in its), False))
  return found


def status(rows: Sequence[Row]) -> str:
  """'13 arms: 12 done, 1 nan'."""
  counts: dict[str, int] = {}
  for row in rows:
    counts[row.status] = counts.get(row.status, 0) + 1
  return f'{len(rows)} arms: ' + ', '.join(f'{n} {status}' for status, n in counts.items())


def environment(rows: Iterable[Row]) -> list[tuple[str, list[str]]]:
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

  found = [
    ('Code', tally(code(run['git']) for run in runs if 'git' in run)),
    (
      'Device',
      tally(
        f'{run["devices"]} × {said(run["device_kind"])}' for run in runs if {'devices', 'device_kind'} <= run.keys()
      ),
    ),
    ('Machine', tally(said(run['machine']) for run in runs if 'machine' in run)),
    ('Python', tally(said(run['python']) for run in runs if 'python' in run)),
    ('Packages', tally(', '.join(f'{k} {v}' for k, v in run['packages'].items()) for run in runs if 'packages' in run)),
  ]
  return [(name, values) for name, values in found if values]
