"""The plots of a report: losses against what a sweep varies, tokens and FLOPs; final losses; differences.

Each is drawn twice: for plots/*.svg with its own colours and legend, and for the page, whose style sheet gives colours
(light or dark). Where the lines are the arms, the page has one legend for all plots.
"""

import functools
import io
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from slm_jax.ablate import stats, swept
from slm_jax.ablate.comparable import LOSS, Metric
from slm_jax.ablate.results import Point, Row
from slm_jax.ablate.table import Line, short

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

INK, RULE = '#202124', '#d0d3d8'
# Okabe and Ito's colours, told apart with every common kind of colour vision; black and yellow left out.
COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#8c6bb1')
DASHES = ('-', '--', ':', '-.')  # for more arms than colours
SEEN = {'tokens': 'training tokens', 'bytes': 'bytes of training text', 'flops': 'training FLOPs'}
MOST_SWEPT, MOST_LINES = 4, 12  # plots of what a sweep varies, and lines in one
STYLE: dict[Any, Any] = {
  'svg.fonttype': 'none',  # text stays text
  'svg.hashsalt': 'slm_jax',  # equal data, equal file
  'text.parse_math': False,  # a dollar sign in a name is a dollar sign
  'font.size': 10,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'grid.color': RULE,
  'grid.linewidth': 0.6,
  **dict.fromkeys(('text.color', 'axes.labelcolor', 'axes.edgecolor', 'xtick.color', 'ytick.color'), INK),
  **dict.fromkeys(('figure.facecolor', 'axes.facecolor', 'savefig.facecolor'), 'none'),
}


class Plot(NamedTuple):
  name: str
  title: str
  svg: str  # for the page: no size of its own, colours by CSS variables
  by_arm: bool  # whether its colours are those of the arms


class Picture(NamedTuple):
  """A plot to be drawn."""

  name: str
  title: str
  paint: 'Callable[[Axes], dict[str, Any]]'  # returns {label: handle} for a legend; empty if there was nothing to paint
  height: float = 3.2
  by_arm: bool = True
  floors: Sequence[float] = ()  # entropies of the data, as lines across


def draw(
  folder: Path,
  lines: Sequence[Line],
  curves: Mapping[str, Sequence[Point]],
  training: Mapping[str, Sequence[Point]] = {},
) -> list[Plot]:
  """Writes FOLDER/NAME.svg for all plots that there are data for, and returns them for the page.

  curves, training: see `results.curves` and `results.training_curves`.
  """
  metric = lines[0].metric if lines else LOSS
  floors = sorted({round(f, 6) for line in lines for row in line.rows if (f := floor(row, metric)) is not None})[:3]
  unit = 'tokens' if metric is LOSS else 'bytes'
  compared = [line for line in lines if line.comparison is not None and line.comparison.n]
  names = [line.name for line in compared]
  baseline = next((line.name for line in lines if line.is_baseline), '')
  flops = 'training FLOPs, a teacher’s forward passes included'
  wanted = [
    *pictures_of_sweeps(lines, floors),
    Picture(
      'differences',
      f'Difference to {baseline}, {metric.title}, and its 95 % interval; left of 0 is better',
      lambda ax: differences(ax, names, [line.comparison.difference for line in compared if line.comparison], metric),
      height_of(names),
    ),
    curves_picture(f'loss_{unit}', f'Loss on held-out text against {SEEN[unit]}', lines, curves, unit, floors),
    curves_picture('loss_flops', f'The same against {flops}', lines, curves, 'flops', floors),
    curves_picture(f'training_{unit}', f'Training loss against {SEEN[unit]}', lines, training, unit, floors),
    Picture(
      'final_loss',
      'Final loss: each seed, mean and 95 % interval',
      lambda ax: _finals(ax, lines),
      height_of([line.name for line in lines]),
      floors=floors,
    ),
  ]
  return save(folder, wanted)


def curves_picture(
  name: str,
  title: str,
  lines: Sequence[Line],
  curves: Mapping[str, Sequence[Point]],
  unit: str,
  floors: Sequence[float],
) -> Picture:
  """Mean curves of all arms. The steep start would flatten the rest: what lies above the view is said in the title."""
  metric = lines[0].metric if lines else LOSS
  runs = {line.name: [curves[row.arm_id] for row in line.rows if row.arm_id in curves] for line in lines}
  known = {arm: [run for run in found if getattr(run[-1], unit) is not None] for arm, found in runs.items()}
  means = {arm: mean_curve(found, unit, metric) for arm, found in known.items()}
  late = [y for xs, ys, _ in means.values() for x, y in zip(xs, ys, strict=True) if x >= 0.2 * xs[-1]]
  top = max(late, default=0.0) + 0.05 * (max(late, default=0.0) - min(late, default=0.0)) + 1e-3
  if any(y > top for _, ys, _ in means.values() for y in ys):
    title += f'; the start above {top:.3g} is cut off'
  return Picture(name, title, lambda ax: _curves(ax, means, unit, metric, top), floors=floors)


def floor(row: Row, metric: Metric) -> float | None:
  """The entropy of a run's held-out text, in the metric's unit; None where it is not known."""
  nats = row.summary.get('floor')
  return nats if nats is None or metric is LOSS else nats * row.summary[metric.key] / row.summary[LOSS.key]


def save(folder: Path, wanted: Iterable[Picture]) -> list[Plot]:
  """Writes FOLDER/NAME.svg of those that have something in them; returns them for the page."""
  plots = []
  for picture in wanted:
    page, file = (_figure(picture, standalone) for standalone in (False, True))
    if page is not None and file is not None:
      folder.mkdir(parents=True, exist_ok=True)
      (folder / f'{picture.name}.svg').write_text(_svg(file), encoding='utf-8')
      plots.append(Plot(picture.name, picture.title, for_page(_svg(page)), picture.by_arm))
  return plots


def height_of(names: Sequence[str]) -> float:
  """Of a plot with a line of its own for each name, in inches."""
  return 0.9 + 0.15 * sum(2 + plain(name).count('\n') for name in names)


def style(i: int) -> tuple[int, int]:
  """Places of `colour(i)` in COLOURS and DASHES."""
  return i % len(COLOURS), i // len(COLOURS) % len(DASHES)


def colour(i: int) -> tuple[str, str]:
  """Colour and dash of the i-th arm, the same in all plots."""
  tint, dash = style(i)
  return COLOURS[tint], DASHES[dash]


def _figure(picture: Picture, standalone: bool) -> 'Figure | None':
  """One axes, painted; None if there was nothing to paint."""
  import matplotlib
  from matplotlib.figure import Figure  # without pyplot: no global state, no display

  colours: dict[Any, Any] = {'figure.facecolor': 'white', 'savefig.facecolor': 'white'} if standalone else {}
  with matplotlib.rc_context({**STYLE, **colours}):
    figure = Figure(figsize=(5.0, picture.height), layout='constrained')
    ax = figure.subplots()
    handles = picture.paint(ax)
    if not handles:
      return None
    along = ax.axvline if ax.get_xlabel().startswith('loss') else ax.axhline
    for floor in picture.floors:
      handles['entropy of the data'] = along(floor, color=INK, linestyle='--', linewidth=0.9)
    if standalone or not picture.by_arm:
      labels = {plain(name): handle for name, handle in handles.items() if name}
      if labels:
        rows = sum(2 + name.count('\n') for name in labels) / 2  # of which three fit as it is
        figure.set_figheight(picture.height + 0.15 * max(0, rows - 3))
        figure.legend(list(labels.values()), list(labels), loc='outside lower center', ncols=2, frameon=False)
  return figure


Curve = tuple[list[float], list[float], list[float]]  # x, mean, half of the 95 % interval


def _curves(ax: 'Axes', means: Mapping[str, Curve], unit: str, metric: Metric, top: float) -> dict:
  """Mean over seeds, with the 95 % interval as a band."""
  from matplotlib.ticker import EngFormatter

  handles, right = {}, 0.0
  for i, (name, (xs, ys, halves)) in enumerate(means.items()):
    if not xs:
      continue
    tint, dash = colour(i)
    (handles[name],) = ax.plot(xs, ys, color=tint, linestyle=dash, linewidth=1.6)
    low, high = ([y + s * h for y, h in zip(ys, halves, strict=True)] for s in (-1, 1))
    ax.fill_between(xs, low, high, color=tint, alpha=0.18, linewidth=0)
    right = max(right, xs[-1])
  if handles:
    ax.set_ylim(top=top)
    ax.set_xlim(0, right * 1.02 or 1)  # 0: nothing was trained
    ax.xaxis.set_major_formatter(EngFormatter(sep=''))
  ax.set_xlabel(SEEN[unit])
  ax.set_ylabel(metric.title)
  return handles


def mean_curve(runs: Sequence[Sequence[Point]], unit: str, metric: Metric = LOSS) -> Curve:
  """`(x, mean loss, half of its 95 % interval)` at the steps that all runs have; the half is 0 for a single run."""
  if not runs:
    return [], [], []
  steps = sorted(set.intersection(*({point.step for point in run} for run in runs)))
  at = [{point.step: point for point in run} for run in runs]
  xs = [sum(getattr(points[step], unit) for points in at) / len(at) for step in steps]
  spans = [stats.interval(metric.of(points[step]) for points in at) for step in steps]
  return xs, [span.mean for span in spans], [span.half if span.n > 1 else 0.0 for span in spans]


def _finals(ax: 'Axes', lines: Sequence[Line]) -> dict:
  handles = {}
  for i, line in enumerate(lines):
    losses = [row.summary[line.metric.key] for row in line.rows if row.summary]
    if not losses:
      continue
    tint, _ = colour(i)
    mean, half = line.loss.mean, line.loss.half if line.loss.n > 1 else 0.0
    ax.plot(losses, [i - 0.22] * len(losses), 'o', color=tint, alpha=0.45, markersize=4, markeredgewidth=0)
    handles[line.name] = ax.errorbar(mean, i, xerr=half, fmt='D', color=tint, markersize=5, capsize=3, linewidth=1.4)
  ax.set_yticks(range(len(lines)), [plain(line.name) for line in lines])
  ax.set_ylim(len(lines) - 0.4, -0.6)
  ax.grid(axis='y', visible=False)
  ax.set_xlabel(f'loss, {lines[0].metric.title}')
  return handles


def pictures_of_sweeps(lines: Sequence[Line], floors: Sequence[float]) -> list[Picture]:
  """The loss against every number that the sweep varies, at most MOST_SWEPT."""
  found = []
  for sweep in swept.swept(lines)[:MOST_SWEPT]:
    title = f'Loss against {sweep.key}, mean and 95 % interval over seeds; the lowest of a line is filled'
    if sweep.by:
      title += f'; one line for each {" and ".join(sweep.by)}'
    if len(sweep.lines) > MOST_LINES:
      title += f' (the first {MOST_LINES} of {len(sweep.lines)})'
    if sweep.moving:
      title += f'; {", ".join(sweep.moving)} change{"s" * (len(sweep.moving) == 1)} with it'
    means = [line.loss.mean for _, points in sweep.lines[:MOST_LINES] for _, line in points if line.loss.n]
    if means and (top := view(means)[1]) < max(means):
      title += f'; losses above {top:.3g} are cut off'
    if any(diverged(line) for _, points in sweep.lines for _, line in points):
      title += '; ×: a run that diverged'
    name = f'loss_by_{re.sub("[^A-Za-z0-9]+", "_", sweep.key)}'
    found.append(Picture(name, title, functools.partial(_swept, sweep), by_arm=False, floors=floors))
  return found


def view(means: Sequence[float]) -> tuple[float, float]:
  """`(lowest, highest)` loss to show: a few that went astray would flatten all the others."""
  low, middle = min(means), sorted(means)[len(means) // 2]
  if max(means) - low > 6 * (middle - low) > 0:
    return low - 0.5 * (middle - low), low + 6 * (middle - low)
  return low, max(means)


def diverged(line: Line) -> bool:
  return any(row.status == 'diverged' for row in line.rows)


def _swept(sweep: swept.Swept, ax: 'Axes') -> dict:
  from matplotlib.ticker import NullLocator

  handles, means, xs = {}, [], []
  for i, (label, points) in enumerate(sweep.lines[:MOST_LINES]):
    tint, dash = colour(i)
    known = [(float(x), line.loss) for x, line in points if line.loss.n]
    at, losses = [x for x, _ in known], [loss.mean for _, loss in known]
    halves = [loss.half if loss.n > 1 else 0.0 for _, loss in known]
    style: dict[str, Any] = {'color': tint, 'linestyle': dash, 'markerfacecolor': 'none', 'markersize': 4}
    handles[label] = ax.errorbar(at, losses, yerr=halves, marker='o', linewidth=1.4, capsize=2, **style)
    if lowest := swept.best(points):
      ax.plot(lowest[0], lowest[1].mean, 'o', color=tint, markersize=6)
    if bad := [float(x) for x, line in points if diverged(line)]:
      ax.plot(bad, [0.97] * len(bad), 'x', color=tint, transform=ax.get_xaxis_transform())
    means += losses
    xs += [float(x) for x, _ in points]
  if not means:
    return {}
  if min(xs) > 0 and max(xs) >= 8 * min(xs):
    ax.set_xscale('log')
    ax.xaxis.set_minor_locator(NullLocator())
  ticks = sorted(set(xs))
  ticks = ticks[:: 1 + len(ticks) // 9]
  ax.set_xticks(ticks, [short(x) for x in ticks])
  low, top = view(means)
  if top < max(means):
    ax.set_ylim(low, top)
  ax.set_xlabel(sweep.key)
  ax.set_ylabel(sweep.lines[0][1][0][1].metric.title)
  return handles


def differences(ax: 'Axes', names: Sequence[str], values: Sequence[stats.Interval], metric: Metric) -> dict:
  """A line for each name: the difference and its 95 % interval, and where zero is."""
  handles = {}
  for i, (name, value) in enumerate(zip(names, values, strict=True)):
    if value.n:
      half = value.half if value.n > 1 else 0.0
      handles[name] = ax.errorbar(value.mean, i, xerr=half, fmt='D', color=colour(i)[0], markersize=5, capsize=3)
  ax.axvline(0, color=INK, linestyle='--', linewidth=0.9)
  ax.set_yticks(range(len(names)), [plain(name) for name in names])
  ax.set_ylim(len(names) - 0.4, -0.6)
  ax.grid(axis='y', visible=False)
  ax.set_xlabel(f'difference, {metric.title}')
  return handles


def plain(name: str) -> str:
  """A name as a label of at most three short lines."""
  name = name.encode(errors='replace').decode()  # half of a surrogate pair ends the drawing
  return '\n'.join(textwrap.wrap(name, 26, max_lines=3, placeholder='…'))


def _svg(figure: 'Figure') -> str:
  import matplotlib

  text = io.StringIO()
  with matplotlib.rc_context(STYLE), warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'Glyph .* missing')  # of the font that measures; the reader's draws
    figure.savefig(text, format='svg', metadata={'Date': None})
  return text.getvalue()


def for_page(svg: str) -> str:
  """An SVG file as an element of the page: no prologue, no size, colours by name so that the style sheet sets them."""
  svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r'\1', svg[svg.index('<svg') :], count=1)
  svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r'\1', svg, count=1)
  svg = re.sub(r'<metadata>.*?</metadata>', '', svg, count=1, flags=re.DOTALL)
  names = {INK: '--ink', RULE: '--rule', **{hexed: f'--c{i}' for i, hexed in enumerate(COLOURS)}}
  return re.sub(
    r'(fill|stroke): (#[0-9a-f]{6})', lambda m: f'{m[1]}: var({names[m[2]]})' if m[2] in names else m[0], svg
  )
