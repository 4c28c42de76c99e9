"""Which numbers a sweep varies, and the loss against each of them: one line for each setting of everything else.

The plot of learning-rate transfer is the case of two: loss against learning rate, one line a width.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from slm_jax.ablate import results
from slm_jax.ablate.arms import show_apart, shown
from slm_jax.ablate.stats import Interval
from slm_jax.ablate.sweep import SEEDS
from slm_jax.ablate.table import Line
from slm_jax.config import flatten

LEAST = 3  # values that make a line


class Swept(NamedTuple):
  """The loss against the number that stands under `key`."""

  key: str
  moving: tuple[str, ...]  # settings that change with it: a feed-forward width with the model's, say
  by: tuple[str, ...]  # settings that tell the lines apart
  lines: tuple[tuple[str, tuple[tuple[float, Line], ...]], ...]  # (label, ((value, arm), ...)), values growing


def swept(lines: Sequence[Line]) -> list[Swept]:
  """For every number of which the arms have three values or more; the one with most of them, the finest, first."""
  from slm_jax.experiment import Config  # brings JAX with it

  configs = [(line, line.rows[0].config) for line in lines if line.rows[0].config]
  keys = dict.fromkeys(key for _, config in configs for key in config)
  known = [key for key in flatten(Config()) if key in keys]  # as they stand in the code: d_model before d_ff
  known.sort(key=lambda key: not key.startswith('train.'))  # but a warmup follows the steps
  found: list[Swept] = []
  for key in dict.fromkeys([*known, *keys]):
    arms = [(line, config) for line, config in configs if is_number(config.get(key))]
    if key in SEEDS or key.startswith('run.') or any(key in sweep.moving for sweep in found):
      continue
    if len({config[key] for _, config in arms}) >= LEAST:
      found += _against(key, arms, known)
  return sorted(found, key=lambda sweep: -len({x for _, points in sweep.lines for x, _ in points}))


def is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _against(key: str, arms: Sequence[tuple[Line, Any]], order: Sequence[str]) -> list[Swept]:
  rows = [line.rows[0] for line, _ in arms]
  varying = results.differing(rows)
  others = sorted(varying, key=lambda k: order.index(k) if k in order else len(order))
  others = [k for k in others if k not in (key, *SEEDS) and not k.startswith('run.')]
  moving = tuple(k for k in others if _moves_with(k, key, rows))
  rest = [k for k in others if k not in moving]
  groups: dict[tuple[str, ...], list[tuple[float, Line]]] = {}
  for line, config in arms:
    groups.setdefault(tuple(repr(config.get(k)) for k in rest), []).append((config[key], line))
  kept = {values: points for values, points in groups.items() if len({x for x, _ in points}) >= LEAST}
  if not kept:
    return []
  first = {values: points[0][1].rows[0].config for values, points in kept.items()}
  by: list[str] = []
  for k in rest:  # of settings that change together, one is enough to tell the lines apart
    if len(_distinct([*by, k], first.values())) > len(_distinct(by, first.values())):
      by.append(k)
  ranked = sorted(kept, key=lambda values: [_order(first[values].get(k)) for k in by])
  texts = {k: show_apart([first[v].get(k) for v in ranked]) for k in by}
  label = {v: ', '.join(f'{k.rsplit(".", 1)[-1]}={texts[k][i]}' for k in by) for i, v in enumerate(ranked)}
  drawn = tuple((label[v], tuple(sorted(kept[v], key=lambda point: point[0]))) for v in ranked)
  return [Swept(key, moving, tuple(by), drawn)]


def _distinct(keys: Sequence[str], configs: Iterable[Any]) -> set[tuple[str, ...]]:
  return {tuple(repr(config.get(k)) for k in keys) for config in configs}


def _order(value: Any) -> tuple[bool, float, str]:
  return (False, value, '') if is_number(value) else (True, 0.0, shown(value))


def _moves_with(other: str, key: str, rows: Sequence[results.Row]) -> bool:
  """Whether `other` follows from `key`: one value for each of it, and for numbers only ever up or only ever down.

  Two numbers drawn at random follow from each other too, but not in order; they are no line.
  """
  of: dict[float, Any] = {}
  for row in rows:
    if of.setdefault(row.config[key], row.config.get(other)) != row.config.get(other):
      return False
  values = [of[x] for x in sorted(of)]
  if not all(map(is_number, values)):
    return True
  steps = [b - a for a, b in zip(values, values[1:], strict=False)]
  return all(step >= 0 for step in steps) or all(step <= 0 for step in steps)


def best(points: Sequence[tuple[float, Line]]) -> tuple[float, Interval] | None:
  """Value and loss where the mean loss is lowest."""
  known = [(x, line.loss) for x, line in points if line.loss.n]
  return min(known, key=lambda point: point[1].mean) if known else None
