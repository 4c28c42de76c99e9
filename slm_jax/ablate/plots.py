"""The plots of a report: loss against tokens and FLOPs with bands over seeds, and final losses with intervals.

Each is drawn twice: for plots/*.svg with its own colours and legend, and for the page, whose style sheet gives colours
(light or dark) and whose legend stands above all plots.
"""

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from slm_jax.ablate import results, stats
from slm_jax.ablate.results import Point
from slm_jax.ablate.table import Line

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

INK, RULE = '#202124', '#d0d3d8'
# Okabe and Ito's colours, told apart with every common kind of colour vision; black and yellow left out.
COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#8c6bb1')
DASHES = ('-', '--', ':', '-.')  # for more arms than colours
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


def draw(workdir: Path, lines: Sequence[Line]) -> list[Plot]:
  """Writes plots/NAME.svg for all plots that there are data for, and returns them for the page."""
  curves = {line.name: [c for c in (results.curve(workdir, row) for row in line.rows) if c] for line in lines}
  floors = sorted({round(f, 6) for line in lines for row in line.rows if (f := row.summary.get('floor')) is not None})
  wanted = [
    ('loss_tokens', 'Loss on held-out text against training tokens', lambda ax: _curves(ax, curves, 'tokens')),
    (
      'loss_flops',
      'The same against training FLOPs, a teacher’s forward passes included',
      lambda ax: _curves(ax, curves, 'flops'),
    ),
    ('final_loss', 'Final loss: each seed, mean and 95 % interval', lambda ax: _finals(ax, lines)),
  ]
  plots = []
  for name, title, paint in wanted:
    rows = sum(1 + _plain(line.name).count('\n') for line in lines)
    height = 0.9 + 0.15 * (len(lines) + rows) if name == 'final_loss' else 3.2
    page, file = (_figure(paint, floors, height, standalone) for standalone in (False, True))
    if page is not None and file is not None:
      (workdir / 'plots').mkdir(exist_ok=True)
      (workdir / 'plots' / f'{name}.svg').write_text(_svg(file), encoding='utf-8')
      plots.append(Plot(name, title, for_page(_svg(page))))
  return plots


def colour(i: int) -> tuple[str, str]:
  """Colour and dash of the i-th arm, the same in all plots."""
  return COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]


def _figure(paint, floors: Sequence[float], height: float, standalone: bool) -> 'Figure | None':
  """One axes, painted; None if there was nothing to paint."""
  import matplotlib
  from matplotlib.figure import Figure  # without pyplot: no global state, no display

  colours: dict[Any, Any] = {'figure.facecolor': 'white', 'savefig.facecolor': 'white'} if standalone else {}
  with matplotlib.rc_context({**STYLE, **colours}):
    figure = Figure(figsize=(5.0, height), layout='constrained')
    ax = figure.subplots()
    handles = paint(ax)
    if not handles:
      return None
    along = ax.axvline if ax.get_xlabel().startswith('loss') else ax.axhline
    for floor in floors[:3]:
      handles['entropy of the data'] = along(floor, color=INK, linestyle='--', linewidth=0.9)
    if standalone:
      figure.legend(
        list(handles.values()), [_plain(name) for name in handles], loc='outside lower center', ncols=2, frameon=False
      )
  return figure


def _curves(ax: 'Axes', curves: Mapping[str, Sequence[Sequence[Point]]], unit: str) -> dict:
  """Mean over seeds, with the 95 % interval as a band. The steep start is left out of view."""
  from matplotlib.ticker import EngFormatter

  handles, right, seen = {}, 0.0, []
  for i, (name, runs) in enumerate(curves.items()):
    xs, means, halves = mean_curve([run for run in runs if getattr(run[-1], unit) is not None], unit)
    if not xs:
      continue
    tint, dash = colour(i)
    (handles[name],) = ax.plot(xs, means, color=tint, linestyle=dash, linewidth=1.6)
    low, high = ([m + s * h for m, h in zip(means, halves, strict=True)] for s in (-1, 1))
    ax.fill_between(xs, low, high, color=tint, alpha=0.18, linewidth=0)
    right = max(right, xs[-1])
    seen += [mean for x, mean in zip(xs, means, strict=True) if x >= 0.2 * xs[-1]]
  if handles:
    ax.set_ylim(top=max(seen) + 0.05 * (max(seen) - min(seen)) + 1e-3)
    ax.set_xlim(0, right * 1.02)
    ax.xaxis.set_major_formatter(EngFormatter(sep=''))
  ax.set_xlabel({'tokens': 'training tokens', 'flops': 'training FLOPs'}[unit])
  ax.set_ylabel('nats per token')
  return handles


def mean_curve(runs: Sequence[Sequence[Point]], unit: str) -> tuple[list[float], list[float], list[float]]:
  """`(x, mean loss, half of its 95 % interval)` at the steps that all runs have; the half is 0 for a single run."""
  if not runs:
    return [], [], []
  steps = sorted(set.intersection(*({point.step for point in run} for run in runs)))
  at = [{point.step: point for point in run} for run in runs]
  xs = [sum(getattr(points[step], unit) for points in at) / len(at) for step in steps]
  spans = [stats.interval(points[step].loss for points in at) for step in steps]
  return xs, [span.mean for span in spans], [span.half if span.n > 1 else 0.0 for span in spans]


def _finals(ax: 'Axes', lines: Sequence[Line]) -> dict:
  handles = {}
  for i, line in enumerate(lines):
    losses = [row.summary['loss'] for row in line.rows if row.summary]
    if not losses:
      continue
    tint, _ = colour(i)
    mean, half = line.loss.mean, line.loss.half if line.loss.n > 1 else 0.0
    ax.plot(losses, [i - 0.22] * len(losses), 'o', color=tint, alpha=0.45, markersize=4, markeredgewidth=0)
    handles[line.name] = ax.errorbar(mean, i, xerr=half, fmt='D', color=tint, markersize=5, capsize=3, linewidth=1.4)
  ax.set_yticks(range(len(lines)), [_plain(line.name) for line in lines])
  ax.set_ylim(len(lines) - 0.4, -0.6)
  ax.grid(axis='y', visible=False)
  ax.set_xlabel('loss, nats per token')
  return handles


def _plain(name: str) -> str:
  """A name as a label of at most three short lines."""
  return '\n'.join(textwrap.wrap(name, 26, max_lines=3, placeholder='…'))


def _svg(figure: 'Figure') -> str:
  import matplotlib

  text = io.StringIO()
  with matplotlib.rc_context(STYLE):
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
